"""The ExecuTorch program with four methods: run by its runtime, against training by torch.optim."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig
from peft_edge.export import executorch_step
from peft_edge.export.executorch_step import export_train_program, run_program
from peft_edge.export.train_step import LOGITS, StepOptimizer, TrainStep, capture_train_step, trained_names
from tests.export.support import randomize

SHAPE, RATE = (4, 3, 16, 16), 0.05


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
    program = export_train_program(step, file)
    assert program.state_names == [*step.adapter, *step.state]
    assert 0 < program.difference <= program.allowed_difference
    # All methods share the last arena, which contains the buffers.
    assert len({arenas[-1] for arenas in program.arena_bytes.values()}) == 1
    state_bytes = 4 * sum(value.numel() for value in {**step.adapter, **step.state}.values())
    assert program.arena_bytes["train_step"][-1] >= state_bytes

    batches = {}
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD([each for each in trained.parameters() if each.requires_grad], lr=RATE, momentum=0.9)
    losses = []
    for index in range(3):
        images, labels = torch.randn(SHAPE), torch.randint(5, SHAPE[:1])
        batch = (images, labels, torch.tensor([1.0, 1, 1, 0]), torch.tensor(RATE))
        batches |= {f"{place}.{index}": value for place, value in enumerate(batch)}
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
    torch.testing.assert_close(found[LOGITS], trained(batches["0.0"]).detach(), rtol=1e-3, atol=1e-4)


def test_program_without_xnnpack_replaces_one_that_fails(
    step: TrainStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch")
    run = executorch_step._run_program
    tried = []

    def crash_once(file: Path, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tried.append(file)
        if len(tried) == 1:
            raise RuntimeError("exit code -11: no message")
        return run(file, batches)

    monkeypatch.setattr(executorch_step, "_run_program", crash_once)
    program = export_train_program(step, tmp_path / "train.pte")
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
        export_train_program(step, tmp_path / "train.pte")
    assert not list(tmp_path.iterdir())


def test_single_precision_graph_has_no_double(step: TrainStep) -> None:
    module = executorch_step._single_precision(step.step.module)
    batch = executorch_step._random_batches(step)[0]
    values = {name: value.float() for name, value in {**step.adapter, **step.state, **batch}.items()}
    values["labels"] = batch["labels"]
    found = module(*[values[name] for name in step.step.inputs])
    assert {value.dtype for value in found} == {torch.float32}
    assert {value.dtype for value in step.step.module.buffers()} == {torch.float64}  # the original is unchanged
