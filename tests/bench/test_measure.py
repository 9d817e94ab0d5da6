from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.bench import contenders, measure, run_bench
from peft_edge.bench.contenders import CONTENDERS, Contender
from peft_edge.profiling.analysis import analyse
from peft_edge.records import StepProfile

SMALL = {"batch_size": 2, "image_size": 64, "rounds": 2}


def without_measurements(profile: StepProfile | None) -> dict[str, object]:
    measured = ("_s", "peak_rss_bytes", "steps")
    return {name: value for name, value in vars(profile).items() if not name.endswith(measured)}


@pytest.mark.slow
def test_each_process_measures_its_contender_with_and_without_huge_pages() -> None:
    # LyCORIS is not among the packages of the tests.
    record = run_bench("mobilenetv2_035", ["lora-project", "lycoris-locon"], **SMALL)
    full, project, peer = record.rows
    backbone = load_backbone("mobilenetv2_035", 10)
    size = {"batch_size": 2, "image_size": 64}
    adapter = {"norm": "frozen", "target_modules": "project"}
    lean = analyse(backbone, "lora", lora_rank=4, adapter=adapter, lean=contenders.LEAN_FROZEN, **size).profile[0]
    assert without_measurements(project.profile) == without_measurements(lean)
    assert without_measurements(full.profile) == without_measurements(analyse(backbone, None, **size).profile[0])
    assert (peer.error, peer.rounds, peer.profile) == ("No module named 'lycoris'", [], None)
    assert record.setting["threads"] == 1
    assert [row.name for row in record.rows_without_huge_pages] == ["full", "lora-project", "lycoris-locon"]
    for row in (full, project, *record.rows_without_huge_pages[:2]):
        assert len(row.rounds) == 2
        assert all(times.step_s > 0 for times in row.rounds)
        assert row.rss_growth_bytes is not None
        assert row.compile_s is None
    assert full.rss_growth_bytes > project.rss_growth_bytes


@contextmanager
def contending(name: str, network: nn.Module) -> Iterator[Connection]:
    """Run the worker of a contender in a thread instead of a process. Yield the connection to the worker."""
    ours, theirs = Pipe()
    setting = {"threads": torch.get_num_threads(), "lora_rank": 2}
    images = torch.randn(2, 3, 64, 64)
    thread = threading.Thread(target=measure._contend, args=(theirs, [], name, network, images, setting))
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join()


def fail(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
    raise AttributeError("no\nsuch attribute")


def change(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
    model.get_submodule("classifier").bias.data += 10
    return model.requires_grad_(False).eval(), None


@pytest.mark.parametrize(
    ("build", "message"),
    [(fail, "no such attribute"), (change, "its output differs from the network's output by ")],
)
def test_failing_contender_replies_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tiny_backbone: nn.Module, build: object, message: str
) -> None:
    monkeypatch.setitem(CONTENDERS, "fails", Contender("fails", build))
    with contending("fails", tiny_backbone) as connection:
        connection.send("build and count")
        assert connection.recv().message.startswith(message)


def test_inference_has_no_backward_pass(tiny_backbone: nn.Module) -> None:
    with contending("inference", tiny_backbone) as connection:
        connection.send("build and count")
        assert connection.recv().profile.flops_backward == 0
        connection.send("step")
        times = connection.recv()
        assert times.forward_s > times.backward_s == times.optimizer_s == 0


def test_eval_norms_stay_in_eval_mode_in_the_measured_steps(tiny_backbone: nn.Module) -> None:
    steps = measure._Steps(CONTENDERS["full-eval"], tiny_backbone, torch.randn(2, 3, 64, 64), 2)
    mean = steps._model.bn1.running_mean.clone()
    steps.time()
    assert torch.equal(steps._model.bn1.running_mean, mean)
    assert steps._model.training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full-compile", "peft-lora-eval-compile"])
def test_compiled_contender_has_the_seconds_of_compiling(
    monkeypatch: pytest.MonkeyPatch, name: str, images: torch.Tensor
) -> None:
    # The eager backend needs no C++ compiler and takes seconds.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    steps = measure._Steps(CONTENDERS[name], load_backbone("test_resnet", 10), images, 2)
    costs = steps.begin(is_counted=True)
    assert costs.compile_s is not None
    assert costs.profile.memory_peak_bytes is None
    assert steps.time().step_s < costs.compile_s


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="inception_v3 cannot be trained on images of 32 px: "):
        measure._load({"backbone": "inception_v3", "num_classes": 10, "batch_size": 2, "image_size": 32})
