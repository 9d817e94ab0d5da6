"""Small networks and configurations for the tests of the tuners."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
from peft import PeftConfig
from torch import nn

from peft_edge import ConvLoraConfig
from peft_edge.tuners.conv_adapter import ConvAdapterConfig
from tests.tuners.support import adapter_config, lora_config


@pytest.fixture
def small() -> nn.Module:
    """timm's smallest mobile network, for what takes long on a larger one."""
    return timm.create_model("test_efficientnet", num_classes=10).eval()


@pytest.fixture(params=[ConvLoraConfig, ConvAdapterConfig])
def config_cls(request: pytest.FixtureRequest) -> type[PeftConfig]:
    """The configuration of each tuner, for what all of them do."""
    return request.param


@pytest.fixture
def config(config_cls: type[PeftConfig]) -> Callable[..., PeftConfig]:
    """Makes configurations on every convolution that change the output from the start."""
    return lora_config if config_cls is ConvLoraConfig else adapter_config
