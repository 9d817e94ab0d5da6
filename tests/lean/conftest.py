"""Fixtures that create small frozen networks whose BatchNorm layers have random statistics and weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn


def backbone(name: str) -> nn.Module:
    """Return a frozen network for ten classes, whose BatchNorm layers have random statistics and weights."""
    model = timm.create_model(name, num_classes=10, drop_rate=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.requires_grad_(False).eval()


@pytest.fixture
def make_backbone() -> Callable[[str], nn.Module]:
    """Return a function that creates a frozen timm network with random BatchNorm layers."""
    return backbone


@pytest.fixture
def chain() -> nn.Module:
    """Return a frozen network of a convolution, a BatchNorm, an activation and a second convolution."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers)
    nn.init.uniform_(model[1].running_var, 0.5, 1.5)
    nn.init.normal_(model[1].running_mean)
    return model.requires_grad_(False).eval()
