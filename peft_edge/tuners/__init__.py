"""PEFT tuners for convolutional networks. Importing this package registers them with PEFT."""

from peft_edge.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterLayer, ConvAdapterModel
from peft_edge.tuners.conv_lora import ConvLoraConfig, ConvLoraLayer, ConvLoraModel
from peft_edge.tuners.norm import recalibrate

__all__ = [
    "ConvAdapterConfig",
    "ConvAdapterLayer",
    "ConvAdapterModel",
    "ConvLoraConfig",
    "ConvLoraLayer",
    "ConvLoraModel",
    "recalibrate",
]
