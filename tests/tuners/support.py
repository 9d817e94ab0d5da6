"""Configurations for the tests of the tuners, and a model with changed statistics."""

from __future__ import annotations

from torch import Tensor, nn

from peft_edge import ConvLoraConfig
from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def lora_config(**kwargs: object) -> ConvLoraConfig:
    """ConvLoRA on every convolution, initialised so that it changes the output."""
    return ConvLoraConfig(
        **{"r": 2, "norm": "stats", "target_modules": "all-conv", "init_lora_weights": False, **kwargs}
    )


def adapter_config(**kwargs: object) -> ConvAdapterConfig:
    """ConvAdapter on every convolution, initialised so that it changes the output."""
    return ConvAdapterConfig(**{"norm": "stats", "target_modules": "all-conv", "init_weights": False, **kwargs})


def shifted(model: nn.Module, images: Tensor, scale: float = 2.0) -> nn.Module:
    """Move the running statistics to brighter or darker images, and return the model in eval mode."""
    model.train()
    for _ in range(3):
        model(images * scale)
    return model.eval()
