"""Create configurations for the tests of the tuners, and change BatchNorm statistics of models."""

from __future__ import annotations

from torch import Tensor, nn

from peft_edge import ConvLoraConfig
from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def lora_config(**kwargs: object) -> ConvLoraConfig:
    """Return a configuration of ConvLoRA for every convolution. The initial adapter changes the output."""
    return ConvLoraConfig(
        **{"r": 2, "norm": "stats", "target_modules": "all-conv", "init_lora_weights": False, **kwargs}
    )


def adapter_config(**kwargs: object) -> ConvAdapterConfig:
    """Return a configuration of ConvAdapter for every convolution. The initial adapter changes the output."""
    return ConvAdapterConfig(**{"norm": "stats", "target_modules": "all-conv", "init_weights": False, **kwargs})


def shifted(model: nn.Module, images: Tensor, scale: float = 2.0) -> nn.Module:
    """Update the running statistics on images that are multiplied by `scale`. Return the model in eval mode."""
    model.train()
    for _ in range(3):
        model(images * scale)
    return model.eval()
