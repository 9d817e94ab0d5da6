"""The BatchNorm layer of a ConvLoRA adapter."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_edge.tuners.norm import BatchNormLayer


class LoraBatchNormLayer(BatchNormLayer, LoraLayer):
    """A `BatchNormLayer` that PEFT takes for one of LoRA's layers, as it does all that `LoraModel` handles."""

    adapter_layer_names = ("lora_norm",)

    def _wrap(self, base_layer: nn.Module) -> None:
        LoraLayer.__init__(self, base_layer)

    def _get_in_out_features(self, module: nn.modules.batchnorm._BatchNorm) -> tuple[int, int]:
        return module.num_features, module.num_features

    def update_layer(  # type: ignore[override]  # PEFT gives the rank by its position
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter that starts from the base layer, or starts it anew; hotswapping asks for its numbers."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = 1.0
        super().update_layer(adapter_name, config=config)

    def __repr__(self) -> str:
        return "conv_lora." + super().__repr__()
