"""Configurations and statistics for the tests of the tuners."""

from __future__ import annotations

from torch import Tensor, nn

from peft_edge import ConvLoraConfig
from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def lora_config(**kwargs: object) -> ConvLoraConfig:
    """LoRA on every convolution that changes the output from the start."""
    return ConvLoraConfig(**{"r": 2, "target_modules": "all-conv", "init_lora_weights": False, **kwargs})


def adapter_config(**kwargs: object) -> ConvAdapterConfig:
    """Bottlenecks beside every convolution that change the output from the start."""
    return ConvAdapterConfig(**{"target_modules": "all-conv", "init_weights": False, **kwargs})


def shifted(model: nn.Module, images: Tensor, scale: float = 2.0) -> nn.Module:
    """The model after its statistics moved to differently lit images."""
    model.train()
    for _ in range(3):
        model(images * scale)
    return model.eval()
