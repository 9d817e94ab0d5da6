"""The ExecuTorch program: run by its runtime, against training by torch.optim."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig
from peft_edge.export import executorch_step
from peft_edge.export.device import export_train_step
from peft_edge.export.device_states import import_state
from peft_edge.export.executorch_step import export_train_program, run_program
from peft_edge.export.step_checks import random_batches
from peft_edge.export.train_step import LOGITS, StepOptimizer, TrainStep, capture_train_step, trained_names
from tests.export.support import adapted, randomize

# ExecuTorch 1.5 calls deprecated functions of Python and torch.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE, RATE = (4, 3, 16, 16), 0.05
BATCHES = random_batches(SHAPE[0], SHAPE[1:], 5)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Hardswish()),
        *(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 5)),
    )
    config = ConvLoraConfig(r=2, target_modules="dense", norm="frozen", modules_to_save=["9"])
    return randomize(get_peft_model(network, config))


@pytest.fixture(scope="module")
def step(model: PeftModel) -> TrainStep:
    return capture_train_step(model, torch.zeros(SHAPE), StepOptimizer())


def test_program_trains_as_torch_does(model: PeftModel, step: TrainStep, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    file = tmp_path / "train.pte"
    program = export_train_program(step, file, BATCHES, RATE)
    assert program.state_names == [*step.adapter, *step.state]
    assert 0 < program.difference <= program.allowed_difference
    # All methods share the last arena, which contains the buffers.
    assert len({arenas[-1] for arenas in program.arena_bytes.values()}) == 1
    state_bytes = 4 * sum(value.numel() for value in {**step.adapter, **step.state}.values())
    assert program.arena_bytes["train_step"][-1] >= state_bytes

    batches = {"learning_rate": torch.tensor(RATE)}
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD([each for each in trained.parameters() if each.requires_grad], lr=RATE, momentum=0.9)
    losses = []
    for index in range(3):
        images, labels = torch.randn(SHAPE), torch.randint(5, SHAPE[:1])
        batch = {"images": images, "labels": labels, "mask": torch.tensor([1.0, 1, 1, 0])}
        batches |= {f"{name}.{index}": value for name, value in batch.items()}
        loss = F.cross_entropy(trained(images[:3]), labels[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = run_program(file, batches)
    torch.testing.assert_close(found["losses"], torch.stack(losses), rtol=1e-4, atol=1e-5)
    parameters = dict(trained.get_base_model().named_parameters())
    for place, inner in enumerate(trained_names(model).values()):
        torch.testing.assert_close(found[f"new.{place}"], parameters[inner].detach(), rtol=1e-3, atol=1e-5)
        assert torch.equal(found[f"reset.{place}"], found[f"old.{place}"])
    torch.testing.assert_close(found[LOGITS], trained(batches["images.0"]).detach(), rtol=1e-3, atol=1e-4)


def test_program_without_xnnpack_replaces_one_that_fails(
    step: TrainStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch")
    run = executorch_step._run_program
    tried = []

    def crash_once(file: Path, *inputs: object) -> dict[str, torch.Tensor]:
        tried.append(file)
        if len(tried) == 1:
            raise RuntimeError("exit code -11: no message")
        return run(file, *inputs)

    monkeypatch.setattr(executorch_step, "_run_program", crash_once)
    program = export_train_program(step, tmp_path / "train.pte", BATCHES, RATE)
    assert len(tried) == 2
    assert not program.xnnpack


def test_nothing_is_left_behind_if_no_program_runs(
    step: TrainStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch")

    def crash(*_: object) -> None:
        raise RuntimeError("exit code -11: no message")

    monkeypatch.setattr(executorch_step, "_run_program", crash)
    with pytest.raises(ValueError, match=r"no ExecuTorch program trains this adapter \(with XNNPACK: exit code -11"):
        export_train_program(step, tmp_path / "train.pte", BATCHES, RATE)
    assert not list(tmp_path.iterdir())


def test_single_precision_graph_has_no_double(step: TrainStep) -> None:
    module = executorch_step._single_precision(step.step.module)
    values = {name: value.float() for name, value in {**step.adapter, **step.state}.items()}
    values |= {**BATCHES[0], "learning_rate": torch.tensor(RATE)}
    found = module(*[values[name] for name in step.step.inputs])
    assert {value.dtype for value in found} == {torch.float32}
    assert {value.dtype for value in step.step.module.buffers()} == {torch.float64}  # the original is unchanged


@pytest.mark.slow
def test_split_network_of_timm_is_exported_and_comes_home(device_base: Path, tmp_path: Path) -> None:
    """The stages after the prefix train on its features, which the program computes itself."""
    pytest.importorskip("executorch")
    model = randomize(adapted(device_base, target_modules="last-stage"), statistics=False)
    report = export_train_step(model, tmp_path / "step", image_size=32, batch_size=2, split=True, format="executorch")
    assert {path.name for path in (tmp_path / "step").iterdir()} == {
        "adapter",
        "state.safetensors",
        "step.json",
        "train.pte",
    }
    description = json.loads((tmp_path / "step" / "step.json").read_text())
    assert description["checks"]["arena_bytes"] == report.arena_bytes
    assert report.arena_bytes.keys() == {"train_step", "predict", "prefix", "get_state", "set_state"}
    assert description["prefix"]["inputs"] == {"images": [2, 3, 32, 32]}
    import_state(tmp_path / "step", tmp_path / "step" / "state.safetensors", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "device_training.json").read_text())["trained_by"] == "train.pte"


def test_missing_executorch_is_named_before_anything_is_written(
    device_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match=r'executorch is not installed: pip install "peft-edge\[executorch\]"'):
        export_train_step(adapted(device_base), tmp_path / "step", image_size=32, format="executorch")
    assert not list(tmp_path.iterdir())
