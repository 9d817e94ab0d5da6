from __future__ import annotations

import re

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from peft_edge.hub.patterns import exact_pattern, is_linear, resolve_patterns


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    "pattern", [r".*\.conv_pw", r"blocks\.[0-1]\..*conv.*", "conv_stem", ".*", r"(?:blocks\.2)?.*\.(se|bn1)", "nothing"]
)
def test_the_same_modules_match_as_with_pythons_expressions(tiny_backbone: nn.Module, pattern: str) -> None:
    names = names_of(tiny_backbone)
    config = LoraConfig(target_modules=pattern, exclude_modules=r".*\.0\..*")
    expected = [name for name in names if name and check_target_module_exists(config, name) is True]
    resolve_patterns(config, names)
    assert [name for name in names if name and check_target_module_exists(config, name) is True] == expected


def test_the_same_ranks_are_chosen_as_by_peft(tiny_backbone: nn.Module) -> None:
    names = names_of(tiny_backbone)
    patterns = {r"blocks\.1\..*": 2, "conv_pw": 4, r"^conv_stem": 8, "0.conv_pw": 16}
    config = LoraConfig(target_modules=["conv_pw"], rank_pattern=dict(patterns))
    resolve_patterns(config, names)
    for name in filter(None, names):
        found = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name))
        assert found == patterns.get(get_pattern_key(patterns, name)), name


def test_catastrophic_patterns_take_no_time() -> None:
    config = LoraConfig(target_modules="(a+)+b", rank_pattern={"(a|a)*c": 1})
    resolve_patterns(config, ["", "a" * 60])
    assert (config.target_modules, config.rank_pattern) == ("", {})


@pytest.mark.parametrize("pattern", ["(?!a).*", r"(a)\1", "(", "(?P<"])
def test_what_needs_more_than_linear_time_is_refused(pattern: str) -> None:
    assert not is_linear(pattern)
    with pytest.raises(ValueError, match=r"target_modules: '.*' is no regular expression that matches in linear time"):
        resolve_patterns(LoraConfig(target_modules=pattern), ["", "a"])


def test_more_targets_than_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="target_modules: expected at most the 2 modules of the network, found 3"):
        resolve_patterns(LoraConfig(target_modules=["a", "b", "c"]), ["", "a"])


def test_patterns_of_layers_must_be_names() -> None:
    config = LoraConfig(target_modules=["a"], layers_to_transform=[1], layers_pattern="(a+)+")
    with pytest.raises(ValueError, match=r"layers_pattern: expected names of modules, found '\(a\+\)\+'"):
        resolve_patterns(config, ["", "a"])


def test_an_exact_pattern_matches_its_names_only() -> None:
    pattern = exact_pattern(["a.b", "c"])
    assert [name for name in ("a.b", "axb", "c", "a.b.c", "") if re.fullmatch(pattern, name)] == ["a.b", "c"]
