from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig, load_backbone, load_pretrained
from peft_edge.hub import save_adapter
from peft_edge.hub.adapter_files import (
    HEADER_LIMIT,
    JSON_LIMIT,
    check_finite,
    exact_pattern,
    read_configuration,
    read_json,
    read_layout,
    resolve_patterns,
)
from tests.hub.support import adapted, change_json


@pytest.mark.parametrize("value", [{}, [], {"a": [1, 2.5, None, True, "é"]}, "x" * 1000])
def test_read_json_equals_the_standard_library(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ('"' + "x" * JSON_LIMIT + '"', "larger than the limit of 1,048,576 bytes"),
        ("9" * 10_000, "integer string conversion"),
        ("{", "Expecting property name"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_json(tmp_path / "a.json")


def test_read_layout_returns_shapes_and_dtypes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0, 4).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_layout(tmp_path / "a.safetensors") == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def written(path: Path, header: dict[str, object], data: bytes = b"", header_size: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_size is None else header_size) + text + data)
    return path


@pytest.mark.parametrize("header_size", [2**63, HEADER_LIMIT + 1, 1000])
def test_header_larger_than_the_file_or_the_limit_is_refused(tmp_path: Path, header_size: int) -> None:
    file = written(tmp_path / "a.safetensors", {}, header_size=header_size)
    with pytest.raises(ValueError, match=r"truncated or damaged: 10 bytes .*its header would take"):
        read_layout(file)


@pytest.mark.parametrize("shape", [[2**40, 2**20], [3], [-1]])
def test_tensor_larger_than_the_file_is_refused(tmp_path: Path, shape: list[int]) -> None:
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_layout(written(tmp_path / "a.safetensors", header, b"\0" * 8))


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"expected tensors of the dtypes F64, .*found \['U8'\]"):
        read_layout(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_tensor(tmp_path: Path, value: float) -> None:
    save_file({"a": torch.zeros(2), "b": torch.tensor([1, value])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="b holds values that are not finite"):
        check_finite(tmp_path / "a.safetensors")


def written_configuration(folder: Path, config: PeftConfig, **changes: Any) -> Path:
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    change_json(path, **changes)
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
def test_saved_configuration_is_read_back(tmp_path: Path, config: PeftConfig) -> None:
    found = read_configuration(written_configuration(tmp_path, config))
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
def test_invalid_values_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = written_configuration(tmp_path, ConvLoraConfig(target_modules=["a"]), **changes)
    with pytest.raises(ValueError, match=problem):
        read_configuration(path)


def test_other_tuners_are_refused_with_advice(tmp_path: Path) -> None:
    path = written_configuration(tmp_path, IA3Config(target_modules=["a"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"found 'IA3'. PEFT's own PeftModel.from_pretrained loads other types"):
        read_configuration(path)


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    "pattern", [r".*\.conv_pw", r"blocks\.[0-1]\..*conv.*", "conv_stem", ".*", r"(?:blocks\.2)?.*\.(se|bn1)", "nothing"]
)
def test_resolved_targets_match_the_same_modules_as_in_peft(tiny_backbone: nn.Module, pattern: str) -> None:
    names = names_of(tiny_backbone)
    config = LoraConfig(target_modules=pattern, exclude_modules=r".*\.0\..*")
    expected = [name for name in names if name and check_target_module_exists(config, name) is True]
    resolve_patterns(config, names)
    assert [name for name in names if name and check_target_module_exists(config, name) is True] == expected


def test_resolved_rank_pattern_gives_the_same_ranks_as_in_peft(tiny_backbone: nn.Module) -> None:
    names = names_of(tiny_backbone)
    patterns = {r"blocks\.1\..*": 2, "conv_pw": 4, r"^conv_stem": 8, "0.conv_pw": 16}
    config = LoraConfig(target_modules=["conv_pw"], rank_pattern=dict(patterns))
    resolve_patterns(config, names)
    for name in filter(None, names):
        found = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name))
        assert found == patterns.get(get_pattern_key(patterns, name)), name


def test_catastrophic_patterns_are_matched_in_linear_time() -> None:
    config = LoraConfig(target_modules="(a+)+b", rank_pattern={"(a|a)*c": 1})
    resolve_patterns(config, ["", "a" * 60])
    assert (config.target_modules, config.rank_pattern) == ("", {})


@pytest.mark.parametrize("pattern", ["(?!a).*", r"(a)\1", "(", "(?P<"])
def test_patterns_that_need_more_than_linear_time_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"target_modules: '.*' is not a regular expression .* in linear time"):
        resolve_patterns(LoraConfig(target_modules=pattern), ["", "a"])


def test_more_targets_than_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="target_modules: expected at most the 2 modules of the network, found 3"):
        resolve_patterns(LoraConfig(target_modules=["a", "b", "c"]), ["", "a"])


def test_layers_pattern_must_be_a_name() -> None:
    config = LoraConfig(target_modules=["a"], layers_to_transform=[1], layers_pattern="(a+)+")
    with pytest.raises(ValueError, match=r"layers_pattern: expected names of modules, found '\(a\+\)\+'"):
        resolve_patterns(config, ["", "a"])


def test_exact_pattern_matches_only_its_names() -> None:
    pattern = exact_pattern(["a.b", "c"])
    assert [name for name in ("a.b", "axb", "c", "a.b.c", "") if re.fullmatch(pattern, name)] == ["a.b", "c"]


def test_saved_card_has_our_tags_and_the_version_of_peft(small_model: PeftModel, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert {"peft", "peft-edge", "timm", "lora", "CONV_LORA"} <= set(card.data.tags)
    assert "- PEFT 0.21" in card.text
    assert str(tmp_path) not in str(card)


@torch.no_grad()
def test_pattern_with_lookahead_is_saved_as_module_names(tmp_path: Path, batch: Tensor) -> None:
    base: nn.Module = load_backbone("test_efficientnet", num_classes=3)
    pattern = r"(?!conv_stem)(conv.*|blocks\.1.*\.conv\w*)"
    model = adapted(base, target_modules=pattern)
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert "conv_head" in saved
    assert "conv_stem" not in saved
    assert model.peft_config["default"].target_modules == pattern
    fresh = load_backbone("test_efficientnet", num_classes=3)
    fresh.load_state_dict(model.unload().state_dict())
    reloaded = load_pretrained(tmp_path / "adapter", base=fresh)
    assert sorted(reloaded.base_model.targeted_module_names) == sorted(model.base_model.targeted_module_names)
