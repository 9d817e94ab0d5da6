"""Small networks for the tests of the tuner."""

from __future__ import annotations

import copy

import pytest
import timm
from peft import get_peft_model
from torch import Tensor, nn

from tests.tuners.conv_lora.support import config, shifted


@pytest.fixture
def small() -> nn.Module:
    """timm's smallest mobile network, for what takes long on a larger one."""
    return timm.create_model("test_efficientnet", num_classes=10).eval()


@pytest.fixture
def adapted(tiny_backbone: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `tiny_backbone` with an adapter whose statistics have moved."""
    return shifted(get_peft_model(copy.deepcopy(tiny_backbone), config()), images)
