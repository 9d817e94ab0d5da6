"""Parameter groups, and updates in the backward pass against ordinary steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from peft_edge.optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreSGD,
    decay_groups,
    galore_param_groups,
    update_in_backward,
)
from peft_edge.tuners.conv_lora import ConvLoraConfig


def names_of(group: dict[str, Any], model: nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def test_kernels_and_matrices_decay_and_vectors_do_not(tiny_backbone: nn.Module) -> None:
    tiny_backbone.conv_stem.requires_grad_(False)

    decayed, others = decay_groups(tiny_backbone, 0.1)

    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names_of(decayed, tiny_backbone) == {
        f"{name}.weight"
        for name, module in tiny_backbone.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "conv_stem"
    }
    trained = {name for name, parameter in tiny_backbone.named_parameters() if parameter.requires_grad}
    assert names_of(others, tiny_backbone) == trained - names_of(decayed, tiny_backbone)


def test_empty_groups_are_left_out() -> None:
    assert len(decay_groups(nn.Linear(3, 3, bias=False), 0.1)) == 1
    assert decay_groups(nn.Linear(3, 3).requires_grad_(False), 0.1) == []


def test_magnitudes_of_dora_do_not_decay(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, ConvLoraConfig(r=2, target_modules="pointwise", use_dora=True, norm="affine"))

    decayed, others = decay_groups(model, 0.1)

    assert {name.rsplit(".", 2)[-2] for name in names_of(decayed, model)} <= {"default", "lora_A", "lora_B"}
    assert any("lora_magnitude_vector" in name for name in names_of(others, model))
    assert not any("lora_A" in name or "lora_B" in name for name in names_of(others, model))


def test_dense_kernels_larger_than_the_rank_are_projected(tiny_backbone: nn.Module) -> None:
    projected, decayed, others = galore_param_groups(tiny_backbone, rank=8, weight_decay=0.1)

    assert {key: value for key, value in projected.items() if key != "params"} == {
        "rank": 8,
        "update_proj_gap": 200,
        "scale": 0.25,
        "proj_type": "std",
        "weight_decay": 0.1,
    }
    assert names_of(projected, tiny_backbone) == {
        f"{name}.weight"
        for name, module in tiny_backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and min(module.weight.flatten(1).shape) > 8
    }
    in_groups = [parameter for group in (projected, decayed, others) for parameter in group["params"]]
    assert len(in_groups) == len(set(in_groups)) == len(list(tiny_backbone.parameters()))
    assert "classifier.weight" in names_of(decayed, tiny_backbone)
    assert any(".conv_dw." in name for name in names_of(decayed, tiny_backbone))
    assert {"rank", "scale"}.isdisjoint(decayed.keys() | others.keys())
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_target_modules_select_the_projected_kernels(tiny_backbone: nn.Module) -> None:
    targets = ["blocks.1.0.conv_dw", "project", "conv_head"]

    projected = galore_param_groups(tiny_backbone, rank=4, target_modules=targets, proj_type="full", scale=1.0)[0]

    names = names_of(projected, tiny_backbone)
    assert {"blocks.1.0.conv_dw.weight", "conv_head.weight", "blocks.6.0.conv_pwl.weight"} <= names
    assert not any(name.endswith("conv_pw.weight") and not name.startswith("blocks.0.") for name in names)
    assert (projected["proj_type"], projected["scale"]) == ("full", 1.0)


def test_convolutions_in_an_adapted_model_are_found(tiny_backbone: nn.Module) -> None:
    plain = names_of(galore_param_groups(tiny_backbone, rank=8)[0], tiny_backbone)
    model = get_peft_model(tiny_backbone, ConvLoraConfig(r=2, target_modules=["conv_head"], norm="frozen"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    projected = names_of(galore_param_groups(model, rank=8)[0], model)

    found = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in projected}
    assert found == plain


@pytest.mark.parametrize("targets", ["dens", ["dense", "blocks.9.conv"]])
def test_unknown_targets_are_rejected(tiny_backbone: nn.Module, targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"'(dens|blocks\.9\.conv)' is neither a layer role nor a convolution"):
        galore_param_groups(tiny_backbone, rank=8, target_modules=targets)


def test_projecting_nothing_is_rejected(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="rank is 500, and none of the 35 trainable convolutions"):
        galore_param_groups(tiny_backbone, rank=500)
    with pytest.raises(ValueError, match="no convolution of target_modules='dense' is trainable"):
        galore_param_groups(tiny_backbone.requires_grad_(False), rank=8)


def test_a_tied_parameter_is_in_one_group() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    model[1].weight = model[0].weight

    projected, others = galore_param_groups(model, rank=2)

    assert [parameter.shape for parameter in projected["params"]] == [torch.Size([6, 6, 1, 1])]
    assert len(others["params"]) == 2


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Yield an `Accelerator`, and reset Accelerate after the test.

    Without the reset, Accelerate would keep the settings of the first `Accelerator` for the whole process.
    """
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
def test_update_in_backward_equals_ordinary_steps(name: str, tiny_backbone: nn.Module) -> None:
    models = [tiny_backbone, copy.deepcopy(tiny_backbone)]
    optimizers = [OPTIMIZERS[name](model) for model in models]
    schedules = [LinearLR(optimizer, total_iters=4) for optimizer in optimizers]
    update_in_backward(optimizers[1])
    # Loading replaces the groups and the state by other objects.
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    start = copy.deepcopy(tiny_backbone)

    for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
        train(model, optimizer, schedule, steps=3)

    for ours, expected, before in zip(models[1].parameters(), models[0].parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, before)


def test_one_gradient_at_a_time_is_in_memory(tiny_backbone: nn.Module) -> None:
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


def test_removing_the_handles_restores_ordinary_training() -> None:
    model = nn.Linear(3, 3)
    for handle in update_in_backward(AdamW(model.parameters())):
        handle.remove()
    before = model.weight.detach().clone()

    model(torch.randn(2, 3)).sum().backward()

    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None


def test_several_processes_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="update_in_backward in 2 processes"):
        update_in_backward(AdamW(nn.Linear(3, 3).parameters()))


def test_optimizer_prepared_for_accumulation_steps_in_every_backward(accelerator: Accelerator) -> None:
    model = nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters()))
    update_in_backward(optimizer)
    before = model.weight.detach().clone()

    with accelerator.accumulate(model):
        accelerator.backward(model(torch.randn(2, 3)).sum())

    assert not accelerator.sync_gradients
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_scaled_gradients_are_rejected(accelerator: Accelerator) -> None:
    optimizer = AcceleratedOptimizer(AdamW(nn.Linear(3, 3).parameters()), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="update_in_backward with mixed_precision='fp16'"):
        update_in_backward(optimizer)
