"""Bottleneck adapters for convolutions; importing this package makes the PEFT type `CONV_ADAPTER` known to PEFT."""

from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.conv_adapter.layer import ConvAdapterLayer
from peft_edge.tuners.conv_adapter.model import ConvAdapterModel
from peft_edge.tuners.registry import add_peft_type, register

__all__ = ["ConvAdapterConfig", "ConvAdapterLayer", "ConvAdapterModel"]

register(add_peft_type("CONV_ADAPTER"), ConvAdapterConfig, ConvAdapterModel, prefix=ConvAdapterModel.prefix)
