"""Fixtures with small networks and configurations, for the tests of the tuners."""

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
    """Return timm's smallest mobile network, for slow tests."""
    return timm.create_model("test_efficientnet", num_classes=10).eval()


@pytest.fixture(params=[ConvLoraConfig, ConvAdapterConfig])
def config_cls(request: pytest.FixtureRequest) -> type[PeftConfig]:
    """Return a configuration class. Each test runs once for each tuner."""
    return request.param


@pytest.fixture
def config(config_cls: type[PeftConfig]) -> Callable[..., PeftConfig]:
    """Return a function that creates a configuration for all convolutions. The initial adapter changes the output."""
    return lora_config if config_cls is ConvLoraConfig else adapter_config
