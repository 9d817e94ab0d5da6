"""Updates in the backward pass against those of an ordinary step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from peft_edge.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD, galore_param_groups, update_in_backward


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Accelerate keeps the first accelerator's settings for the whole process."""
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def galore(optimizer: type[Optimizer], model: nn.Module) -> Optimizer:
    return optimizer(galore_param_groups(model, rank=4, update_proj_gap=2, weight_decay=0.1), lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "torch's": lambda model: AdamW(model.parameters(), lr=1e-2),
    "adamw": partial(galore, GaLoreAdamW),
    "sgd": partial(galore, GaLoreSGD),
    "adafactor": partial(galore, GaLoreAdafactor),
}


def train(model: nn.Module, optimizer: Optimizer, schedule: LinearLR, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        model(torch.randn(2, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_result_is_that_of_ordinary_steps(name: str, tiny_backbone: nn.Module) -> None:
    models = [tiny_backbone, copy.deepcopy(tiny_backbone)]
    optimizers = [OPTIMIZERS[name](model) for model in models]
    schedules = [LinearLR(optimizer, total_iters=4) for optimizer in optimizers]
    update_in_backward(optimizers[1])
    # Groups and state are other objects after loading.
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    start = copy.deepcopy(tiny_backbone)

    for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
        train(model, optimizer, schedule, steps=3)

    for ours, expected, before in zip(models[1].parameters(), models[0].parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, before)


def test_one_gradient_lives_at_a_time(tiny_backbone: nn.Module) -> None:
    most = 0

    def count(parameter: Tensor) -> None:
        nonlocal most
        most = max(most, sum(other.grad is not None for other in tiny_backbone.parameters()))

    for parameter in tiny_backbone.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    update_in_backward(galore(GaLoreAdamW, tiny_backbone))
    tiny_backbone(torch.randn(2, 3, 32, 32)).sum().backward()

    assert most == 1
    assert all(parameter.grad is None for parameter in tiny_backbone.parameters())


def test_the_handles_end_it() -> None:
    model = nn.Linear(3, 3)
    for handle in update_in_backward(AdamW(model.parameters())):
        handle.remove()
    before = model.weight.detach().clone()

    model(torch.randn(2, 3)).sum().backward()

    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="update_in_backward in 2 processes"):
        update_in_backward(AdamW(nn.Linear(3, 3).parameters()))


def test_an_optimizer_that_accelerate_holds_back_is_stepped(accelerator: Accelerator) -> None:
    model = nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters()))
    update_in_backward(optimizer)
    before = model.weight.detach().clone()

    with accelerator.accumulate(model):
        accelerator.backward(model(torch.randn(2, 3)).sum())

    assert not accelerator.sync_gradients
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_scaled_gradients_are_refused(accelerator: Accelerator) -> None:
    optimizer = AcceleratedOptimizer(AdamW(nn.Linear(3, 3).parameters()), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="update_in_backward with mixed_precision='fp16'"):
        update_in_backward(optimizer)
