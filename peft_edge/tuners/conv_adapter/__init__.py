"""Bottleneck adapters for convolutions and blocks. Importing this package registers the PEFT type `CONV_ADAPTER`."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from peft_edge._compat import add_peft_type
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.conv_adapter.layer import ConvAdapterLayer
from peft_edge.tuners.conv_adapter.model import ConvAdapterModel

__all__ = ["ConvAdapterConfig", "ConvAdapterLayer", "ConvAdapterModel"]

if add_peft_type("CONV_ADAPTER") not in PEFT_TYPE_TO_CONFIG_MAPPING:  # a second import must not register the type again
    register_peft_method(
        name="conv_adapter", config_cls=ConvAdapterConfig, model_cls=ConvAdapterModel, is_mixed_compatible=True
    )
