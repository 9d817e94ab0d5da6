"""What PEFT must know of our types, seen through PEFT's own lookups."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.utils import hotswap

import peft_edge.tuners.conv_adapter
import peft_edge.tuners.conv_lora
from peft_edge import ConvLoraConfig, ConvLoraModel
from peft_edge.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterModel


@pytest.mark.parametrize("name", ["CONV_LORA", "CONV_ADAPTER"])
def test_the_type_is_a_real_member(name: str) -> None:
    member = PeftType[name]

    assert member is PeftType(name) is getattr(PeftType, name)
    assert isinstance(member, PeftType)
    assert member == name
    assert member in list(PeftType)
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_peft_finds_the_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CONV_ADAPTER] is ConvAdapterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONV_ADAPTER] is ConvAdapterModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CONV_ADAPTER] == "conv_adapter_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CONV_LORA] is ConvLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONV_LORA] is ConvLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CONV_LORA] == "lora_"
    assert PeftType.CONV_LORA in COMPATIBLE_TUNER_TYPES


def test_registering_again_changes_nothing() -> None:
    before = (
        list(PeftType),
        dict(PEFT_TYPE_TO_CONFIG_MAPPING),
        hotswap._pad_lora_weights,
        dict(hotswap.CONFIG_KEYS_TO_CHECK),
    )

    importlib.reload(peft_edge.tuners.conv_lora)
    importlib.reload(peft_edge.tuners.conv_adapter)

    assert before == (
        list(PeftType),
        dict(PEFT_TYPE_TO_CONFIG_MAPPING),
        hotswap._pad_lora_weights,
        dict(hotswap.CONFIG_KEYS_TO_CHECK),
    )


@pytest.mark.slow
def test_plain_peft_does_not_know_the_type() -> None:
    """The reason for the two lines that an adapter's card shows; if it fails, PEFT has learnt plugins."""
    code = "from peft import PeftType; import sys; sys.exit('CONV_LORA' in PeftType.__members__)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
