"""Small networks for the tests of the tuner."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model
from torch import Tensor, nn

from tests.tuners.support import lora_config, shifted


@pytest.fixture
def adapted(tiny_backbone: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `tiny_backbone` with an adapter whose statistics have moved."""
    return shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config()), images)
