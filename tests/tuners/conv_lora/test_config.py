"""ConvLoraConfig: saving, loading, copying and checks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

from peft_edge import ConvLoraConfig


def test_saved_and_loaded_config_is_equal(tmp_path: Path) -> None:
    config = ConvLoraConfig(r=3, target_modules=["depthwise", "fc"], norm="affine", freeze_a=True, use_dora=True)

    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)

    assert isinstance(loaded, ConvLoraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded._custom_modules == config._custom_modules


def test_plain_peft_reads_it_as_lora_config(tmp_path: Path) -> None:
    ConvLoraConfig(r=3, lora_alpha=5, target_modules=["conv"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))

    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        loaded = PeftConfig.from_pretrained(tmp_path)

    assert type(loaded) is LoraConfig
    assert (loaded.r, loaded.lora_alpha, loaded.target_modules) == (3, 5, {"conv"})


def test_replace_keeps_type_and_layer_classes() -> None:
    config = dataclasses.replace(ConvLoraConfig(target_modules="dense"), r=2)

    assert config.peft_type == "CONV_LORA"
    assert len(config._custom_modules) == 4


def test_init_weights_is_an_alias_of_init_lora_weights() -> None:
    config = ConvLoraConfig(init_lora_weights="pissa")
    config.init_weights = True

    assert config.init_lora_weights is True


def test_unknown_norm_is_rejected_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"norm is 'batch'.*frozen, recalibrate, stats, affine"):
        ConvLoraConfig(norm="batch")
