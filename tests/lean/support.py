"""Add adapters to models, and compare outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_edge import ConvLoraConfig

MakeBackbone = Callable[[str], nn.Module]


def with_adapter(model: nn.Module, config: Any = None, **options: Any) -> nn.Module:
    """Return the model with a randomly initialised adapter."""
    torch.manual_seed(1)
    options = {"norm": "frozen", "target_modules": "all-conv", "init_lora_weights": False, **options}
    return get_peft_model(model, config or ConvLoraConfig(**options))


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return a dict with the output under `output`, and the gradient of each trained parameter under its name."""
    model.zero_grad()
    output = model(images)
    output.square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"output": output.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Compare with the largest value of the tensor, because small sums have the rounding errors of large terms.
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"
