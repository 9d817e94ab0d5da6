"""Which layers names and roles reach, for every tuner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_edge.tuners.targets import sites


def test_a_role_never_reaches_a_layer_of_another_role(config: Callable[..., PeftConfig]) -> None:
    """PEFT takes the whole name `conv1` also for the end of a name."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 8, 3)
    model.block = nn.Sequential()
    model.block.conv1 = nn.Conv2d(8, 8, 3, groups=8)
    model.block.conv2 = nn.Conv2d(8, 8, 1)

    adapted = get_peft_model(model, config(target_modules="dense"))

    assert adapted.base_model.targeted_module_names == ["conv1", "block.conv2"]


def test_a_module_of_a_roles_name_goes_before_the_role(config: Callable[..., PeftConfig]) -> None:
    model = nn.Sequential()
    model.dense, model.conv = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1)

    assert get_peft_model(model, config(target_modules="dense")).base_model.targeted_module_names == ["dense"]


@pytest.mark.parametrize("target", ["depthwize", ["depthwize"]])
def test_unknown_role_is_named_with_the_nearest(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, target: str | list[str]
) -> None:
    before = [name for name, _ in tiny_backbone.named_modules()]

    with pytest.raises(ValueError, match=r"depthwize.*(?i:did you mean) 'depthwise'"):
        get_peft_model(tiny_backbone, config(target_modules=target))

    assert [name for name, _ in tiny_backbone.named_modules()] == before


def test_a_role_that_the_model_lacks_is_named(config: Callable[..., PeftConfig]) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"\['depthwise'\] not found.* has no such convolution"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config(target_modules="depthwise"))


def test_pefts_own_message_where_everything_is_excluded(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module
) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="mismatched target modules and excluded modules"):
        get_peft_model(tiny_backbone, config(target_modules=["conv_stem"], exclude_modules=["conv_stem"]))


def test_without_targets_pefts_own_error(config: Callable[..., PeftConfig], tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(tiny_backbone, config(target_modules=None))


def test_a_misspelt_role_beside_a_right_one_is_named(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module
) -> None:
    with pytest.raises(ValueError, match="'all-convs' is no layer role and no module; did you mean 'all-conv'"):
        get_peft_model(tiny_backbone, config(target_modules=["depthwise", "all-convs"]))


def test_saved_configuration_names_modules(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, tmp_path: Path
) -> None:
    get_peft_model(tiny_backbone, config()).save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert set(targets) == {"conv_stem", "conv_dw", "conv_pw", "conv_pwl", "conv_head"}


def test_sites_are_those_of_the_unadapted_network(config: Callable[..., PeftConfig], tiny_backbone: nn.Module) -> None:
    modules = dict(tiny_backbone.named_modules())
    names = [name for name in modules if name and not name.startswith("classifier")]

    model = get_peft_model(tiny_backbone, config(modules_to_save=["classifier"]))

    adapted = list(sites(model.base_model.model))
    assert [site.name for site in adapted] == names
    assert all(site.base is modules[site.name] for site in adapted)
    assert all(getattr(site.parent, site.child_name) is site.module for site in adapted)
