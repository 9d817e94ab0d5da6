"""Makes this package's tuners known to PEFT, which has no plugin mechanism: everything here is PEFT's private ground.

Every function may be called again with the same arguments and then changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import peft.mixed_model
import peft.tuners.mixed
import peft.tuners.mixed.model
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, register_peft_method
from torch import nn


def add_peft_type(name: str) -> PeftType:
    """Adds a member to PEFT's enumeration of tuner types and returns it.

    `register_peft_method` refuses unknown names, and a plain string instead of a member breaks PEFT's model status.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # The attribute first: once the maps know the name, the enumeration refuses to set it.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(peft_type: PeftType, config_cls: type[PeftConfig], model_cls: type[BaseTuner], *, prefix: str) -> None:
    """Registers a tuner for `get_peft_model` and `PeftModel.from_pretrained`."""
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=peft_type.value.lower(),
            config_cls=config_cls,
            model_cls=model_cls,
            prefix=prefix,
            is_mixed_compatible=True,
        )


def allow_mixed(peft_type: PeftType, model_cls: type[MixedModel]) -> None:
    """Lets `PeftMixedModel` hold adapters of `peft_type`, with `model_cls` as its base model."""
    if peft_type not in peft.tuners.mixed.COMPATIBLE_TUNER_TYPES:
        types = (*peft.tuners.mixed.COMPATIBLE_TUNER_TYPES, peft_type)
        # PEFT reads the tuple from both modules.
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
        peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES = types
        peft.mixed_model.MixedModel = model_cls


def allow_hotswap(peft_type: PeftType, config_keys: list[str], pad: Callable[[nn.Module, int], bool]) -> None:
    """Lets `hotswap_adapter` and `prepare_model_for_compiled_hotswap` handle adapters of `peft_type`.

    Args:
        peft_type: the tuner's type.
        config_keys: configuration keys beside LoRA's own that two adapters must share to be swapped.
        pad: pads the tuner's layers in a model to a rank and says whether it found any.
    """
    if peft_type in hotswap.CONFIG_KEYS_TO_CHECK:
        return
    hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA] + config_keys
    pad_known_layers = hotswap._pad_lora_weights

    @wraps(pad_known_layers)
    def pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
        found = [pad_known_layers(model, target_rank), pad(model, target_rank)]
        return any(found)

    hotswap._pad_lora_weights = pad_lora_weights
