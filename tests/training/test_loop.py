from __future__ import annotations

import copy
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_constant_schedule

from peft_edge import ConvLoraConfig
from peft_edge.config import load_config
from peft_edge.profiling.callback import ProfilingCallback
from peft_edge.records import FAILED, StepProfile
from peft_edge.training import loop
from peft_edge.training.loop import termination_deferred
from peft_edge.training.pipeline import start_accelerator
from peft_edge.training.run_folder import ActiveRun
from tests.training.support import RunTraining, adapter_of, record_of


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_sigterm_is_deferred_and_the_second_has_its_previous_effect() -> None:
    seen: list[int] = []
    outside = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with termination_deferred(is_alone=True) as is_asked:
            assert not is_asked()
            terminate()
            assert is_asked()
            assert seen == []
            terminate()
            assert seen == [signal.SIGTERM]
        terminate()
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, outside)


def test_one_of_several_processes_does_not_defer_sigterm() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with termination_deferred(is_alone=False) as is_asked:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not is_asked()


def test_outside_the_main_thread_no_signal_handler_changes() -> None:
    found: list[bool] = []

    def enter() -> None:
        with termination_deferred(is_alone=True) as is_asked:
            found.append(is_asked())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_previous_handler_is_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), termination_deferred(is_alone=True):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_after_a_full_disk_the_run_resumes_with_identical_bits(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["adapter.lora_dropout=0.1"]  # makes the random state matter
    run(tmp_path / "whole", *options)
    save_checkpoint = loop.save_checkpoint

    def save_on_a_disk_that_fills_up(accelerator, folder, progress, *, keep) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if progress.step == 1 else 100_000, hard))
        try:
            save_checkpoint(accelerator, folder, progress, keep=keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", save_on_a_disk_that_fills_up)
        with pytest.raises(OSError, match=r"no space to write .*step_00000002: [\d,]+ bytes"):
            run(tmp_path / "stopped", *options)
    checkpoints = tmp_path / "stopped" / "checkpoints" / "lr_0.01"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000001"]
    failed = record_of(tmp_path / "stopped")
    assert failed.train_info.status == FAILED
    assert "no space to write" in failed.run_info.error_msg

    steps = []
    step = loop._step
    monkeypatch.setattr(loop, "_step", lambda *arguments: steps.append(1) or step(*arguments))
    record = run(tmp_path / "stopped", *options)
    assert len(steps) == 4 - 1
    assert record.run_info.total_time is None
    assert_identical(adapter_of(tmp_path / "stopped"), adapter_of(tmp_path / "whole"))


def test_a_terminated_run_saves_its_last_step_and_resumes_with_identical_bits(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["adapter.lora_dropout=0.1", "training.checkpoint_every_steps=1000"]
    run(tmp_path / "whole", *options)
    steps = []
    step = loop._step

    def step_and_be_terminated(*arguments):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", step_and_be_terminated)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "stopped", *options)
    assert caught.value.code == 128 + signal.SIGTERM
    checkpoints = tmp_path / "stopped" / "checkpoints" / "lr_0.01"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000003"]

    run(tmp_path / "stopped", *options)
    assert len(steps) == 4
    assert_identical(adapter_of(tmp_path / "stopped"), adapter_of(tmp_path / "whole"))


def test_gradient_accumulation_does_not_change_the_result(run: RunTraining, tmp_path: Path) -> None:
    """With frozen norms an image's gradient does not depend on the rest of its batch."""
    frozen = ["norm=frozen", "training.epochs=1"]
    run(tmp_path / "one", *frozen)
    run(tmp_path / "four", *frozen, "training.gradient_accumulation_steps=4")
    one, four = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=1e-4, rtol=1e-3)


@pytest.fixture
def network(tiny_backbone: nn.Module) -> nn.Module:
    """Return `tiny_backbone` with LoRA adapters of two ranks."""
    config = ConvLoraConfig(r=2, rank_pattern={"blocks.1.0.conv_pw": 4}, target_modules="pointwise")
    return get_peft_model(tiny_backbone, config)


DATA = [{"pixel_values": torch.zeros(3, 32, 32), "labels": label} for label in range(6)] * 4


def train_in_our_loop(network: nn.Module, folder: Path, *overrides: str) -> list[StepProfile]:
    """Train `network` for three steps of eight images with `train`, and return the step profiles."""
    AcceleratorState._reset_state(reset_partial_state=True)
    given = ["training.epochs=1", "training.max_grad_norm=1.0", "training.batch_size=8", "trackers=[]", "--cpu"]
    config = load_config([f"output_dir={folder}", "data.shift=blend", *given, *overrides])
    accelerator = start_accelerator(config)
    optimizer = AdamW([parameter for parameter in network.parameters() if parameter.requires_grad])
    batches = DataLoader(DATA, batch_size=8)
    prepared = accelerator.prepare(network, optimizer, get_constant_schedule(optimizer), batches, batches)
    return loop.train(*prepared, evaluated=prepared[0], run=ActiveRun(config, accelerator, False), name="a")[1]


class ImageTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])


@pytest.mark.parametrize("parts", [1, 2])
def test_trainer_reports_the_same_profile_as_our_loop(
    network: nn.Module, tmp_path: Path, trainer_arguments: Callable[..., TrainingArguments], parts: int
) -> None:
    ours = train_in_our_loop(copy.deepcopy(network), tmp_path, f"training.gradient_accumulation_steps={parts}")

    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = trainer_arguments(
        per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_grad_norm=1.0
    )
    optimizer = AdamW([parameter for parameter in network.parameters() if parameter.requires_grad])
    callback = ProfilingCallback()
    trainer = ImageTrainer(
        network,
        arguments,
        train_dataset=DATA,
        optimizers=(optimizer, get_constant_schedule(optimizer)),
        callbacks=[callback],
    )
    trainer.train()

    assert [(row.scope, row.lora_rank) for row in ours] == [("step", None), ("layers", 2), ("layers", 4)]
    for our, other in zip(ours, callback.rows, strict=True):
        for name, value in vars(our).items():
            if name.startswith("flops_elementwise") or name == "flops_optimizer":
                # Each loop scales and sums up the loss, a single number, in its own way.
                assert getattr(other, name) == pytest.approx(value, abs=4 * parts), name
            elif name.startswith("memory_"):
                assert getattr(other, name) == pytest.approx(value, abs=16), name
            elif not name.endswith("_s") and name != "peak_rss_bytes":
                assert getattr(other, name) == value, name


def test_profiling_can_be_turned_off(network: nn.Module, tmp_path: Path) -> None:
    assert train_in_our_loop(network, tmp_path, "profiling.every_n_steps=0", "profiling.trace=true") == []
    assert list(tmp_path.iterdir()) == []


def test_one_step_is_traced_on_request(network: nn.Module, tmp_path: Path) -> None:
    longer = ["training.epochs=2", "profiling.trace=true"]
    train_in_our_loop(network, tmp_path, *longer)
    assert (tmp_path / "traces" / "a" / "process_0.json").exists()
