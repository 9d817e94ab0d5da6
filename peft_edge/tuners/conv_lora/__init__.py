"""LoRA and DoRA for convolutions; importing this package makes the PEFT type `CONV_LORA` known to PEFT."""

from peft_edge.tuners.conv_lora.config import ConvLoraConfig
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, pad_rank
from peft_edge.tuners.conv_lora.model import ConvLoraMixedModel, ConvLoraModel
from peft_edge.tuners.registry import add_peft_type, allow_hotswap, allow_mixed, register

__all__ = ["ConvLoraConfig", "ConvLoraLayer", "ConvLoraModel"]

_CONV_LORA = add_peft_type("CONV_LORA")
register(_CONV_LORA, ConvLoraConfig, ConvLoraModel, prefix=ConvLoraModel.prefix)
allow_mixed(_CONV_LORA, ConvLoraMixedModel)
allow_hotswap(_CONV_LORA, ["norm"], pad_rank)
