from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig

from peft_edge import ConvAdapterConfig, ConvLoraConfig
from peft_edge.hub.configuration import read_configuration


def written(folder: Path, config: PeftConfig, **changes: Any) -> Path:
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    "config",
    [
        ConvLoraConfig(r=3, target_modules=["a"], norm="affine", rank_pattern={"a": 2}),
        ConvAdapterConfig(reduction=2, target_modules=["a"]),
        LoraConfig(target_modules="a|b", init_lora_weights="pissa"),
        LoHaConfig(target_modules=["a"]),
        LoKrConfig(target_modules=["a"]),
    ],
)
def test_what_peft_saves_comes_back(tmp_path: Path, config: PeftConfig) -> None:
    found = read_configuration(written(tmp_path, config))
    assert type(found) is type(config)
    assert found.to_dict() == PeftConfig.from_pretrained(str(tmp_path)).to_dict()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora_alpa": 3}, "unknown key 'lora_alpa'; did you mean lora_alpha"),
        ({"r": "large"}, "r: Input should be a valid integer.*found 'large'"),
        ({"target_modules": 7}, "target_modules: .*found 7"),
        ({"norm": "batch"}, "norm: Input should be 'frozen'"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "megatron_config: expected null"),
        ({"init_lora_weights": "pissa_niter_999999999"}, "init_lora_weights: expected one of"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: expected one of"),
        ({"target_modules": "a", "layers_to_transform": [1]}, "ValueError: .*layers_to_transform"),
        ({"peft_type": "XLORA"}, "expected a peft_type of CONV_LORA, .*found 'XLORA'"),
        ({"peft_type": ["LORA"]}, "expected a peft_type of CONV_LORA"),
    ],
)
def test_values_that_make_no_sense_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = written(tmp_path, ConvLoraConfig(target_modules=["a"]), **changes)
    with pytest.raises(ValueError, match=problem):
        read_configuration(path)


def test_other_tuners_are_left_to_peft(tmp_path: Path) -> None:
    path = written(tmp_path, IA3Config(target_modules=["a"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"found 'IA3'. PEFT's own PeftModel.from_pretrained loads others"):
        read_configuration(path)
