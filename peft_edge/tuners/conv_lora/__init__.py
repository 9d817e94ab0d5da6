"""LoRA and DoRA for convolutions. Importing this package registers the PEFT type `CONV_LORA`."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from peft_edge._compat import add_peft_type, allow_hotswap, allow_mixed
from peft_edge.tuners.conv_lora.config import ConvLoraConfig
from peft_edge.tuners.conv_lora.layer import ConvLoraLayer, pad_rank
from peft_edge.tuners.conv_lora.model import ConvLoraMixedModel, ConvLoraModel

__all__ = ["ConvLoraConfig", "ConvLoraLayer", "ConvLoraModel"]

_CONV_LORA = add_peft_type("CONV_LORA")
if _CONV_LORA not in PEFT_TYPE_TO_CONFIG_MAPPING:  # a second import must not register the type again
    register_peft_method(
        name="conv_lora", config_cls=ConvLoraConfig, model_cls=ConvLoraModel, prefix="lora_", is_mixed_compatible=True
    )
allow_mixed(_CONV_LORA, ConvLoraMixedModel)
allow_hotswap(_CONV_LORA, ["norm"], pad_rank)
