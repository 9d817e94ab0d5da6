"""For every tuner: which modules an adapter reaches, and how it is saved and loaded."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from timm.layers import StdConv2d
from torch import Tensor, nn

from peft_edge.tuners.injection import iter_target_modules
from tests.tuners.support import shifted


def test_role_does_not_match_a_layer_of_another_role(config: Callable[..., PeftConfig]) -> None:
    """In PEFT, the name `conv1` also matches `block.conv1`."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 8, 3)
    model.block = nn.Sequential()
    model.block.conv1 = nn.Conv2d(8, 8, 3, groups=8)
    model.block.conv2 = nn.Conv2d(8, 8, 1)

    adapted = get_peft_model(model, config(target_modules="dense"))

    assert adapted.base_model.targeted_module_names == ["conv1", "block.conv2"]


def test_module_with_the_name_of_a_role_takes_precedence(config: Callable[..., PeftConfig]) -> None:
    model = nn.Sequential()
    model.dense, model.conv = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1)

    assert get_peft_model(model, config(target_modules="dense")).base_model.targeted_module_names == ["dense"]


@pytest.mark.parametrize("target", ["depthwize", ["depthwize"]])
def test_misspelt_role_is_rejected_with_the_nearest_one(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, target: str | list[str]
) -> None:
    before = [name for name, _ in tiny_backbone.named_modules()]

    with pytest.raises(ValueError, match=r"depthwize.*(?i:did you mean) 'depthwise'"):
        get_peft_model(tiny_backbone, config(target_modules=target))

    assert [name for name, _ in tiny_backbone.named_modules()] == before


def test_role_without_a_module_is_rejected(config: Callable[..., PeftConfig]) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"\['depthwise'\] not found.* has no such convolution"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), config(target_modules="depthwise"))


def test_excluding_every_target_raises_pefts_error(config: Callable[..., PeftConfig], tiny_backbone: nn.Module) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="mismatched target modules and excluded modules"):
        get_peft_model(tiny_backbone, config(target_modules=["conv_stem"], exclude_modules=["conv_stem"]))


def test_missing_targets_raise_pefts_error(config: Callable[..., PeftConfig], tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(tiny_backbone, config(target_modules=None))


def test_misspelt_role_beside_a_valid_one_is_rejected(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module
) -> None:
    with pytest.raises(ValueError, match="'all-convs' is no layer role and no module; did you mean 'all-conv'"):
        get_peft_model(tiny_backbone, config(target_modules=["depthwise", "all-convs"]))


def test_saved_configuration_contains_module_names(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, tmp_path: Path
) -> None:
    get_peft_model(tiny_backbone, config()).save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert set(targets) == {"conv_stem", "conv_dw", "conv_pw", "conv_pwl", "conv_head"}


def test_iter_target_modules_yields_those_of_the_unadapted_network(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module
) -> None:
    modules = dict(tiny_backbone.named_modules())
    names = [name for name in modules if name and not name.startswith("classifier")]

    model = get_peft_model(tiny_backbone, config(modules_to_save=["classifier"]))

    adapted = list(iter_target_modules(model.base_model.model))
    assert [target.name for target in adapted] == names
    assert all(target.base is modules[target.name] for target in adapted)
    assert all(getattr(target.parent, target.child_name) is target.module for target in adapted)


def test_untrained_adapter_keeps_the_output(
    config_cls: type[PeftConfig], tiny_backbone: nn.Module, images: Tensor
) -> None:
    model = get_peft_model(copy.deepcopy(tiny_backbone), config_cls(target_modules="all-conv")).eval()

    assert torch.equal(model(images), tiny_backbone(images))


def test_rejected_layer_leaves_the_model_unchanged(config: Callable[..., PeftConfig]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), StdConv2d(8, 8, 3))

    with pytest.raises(ValueError, match=r"'2': StdConv2d is not a plain convolution"):
        get_peft_model(model, config())

    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, StdConv2d]


def test_adding_an_adapter_keeps_the_others_frozen(config: Callable[..., PeftConfig], tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, config(norm="affine"))
    model.set_requires_grad("default", requires_grad=False)

    model.add_adapter("other", config(norm="affine"))

    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_have_the_mode_of_the_model(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, training: bool
) -> None:
    model = get_peft_model(tiny_backbone.train(training), config(norm="affine"))
    model.add_adapter("other", config())

    assert {module.training for module in model.modules() if isinstance(module, BaseTunerLayer | nn.BatchNorm2d)} == {
        training
    }


def test_modules_to_save_are_saved_and_loaded(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(copy.deepcopy(tiny_backbone), config(modules_to_save=["classifier"]))
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = shifted(model, images)(images)
    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(tiny_backbone, tmp_path)(images), expected)


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_low_cpu_mem_usage_loads_the_same_model(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, images: Tensor, tmp_path: Path, norm: str
) -> None:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), config(norm=norm)), images)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_backbone, tmp_path, low_cpu_mem_usage=True)

    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    # Not bit-identical: kernels may sum in another order for tensors at other addresses.
    torch.testing.assert_close(loaded.eval()(images), model(images), atol=1e-4, rtol=1e-4)


def test_inject_adapter_in_model_works_without_a_peft_model(
    config: Callable[..., PeftConfig], tiny_backbone: nn.Module, images: Tensor
) -> None:
    adapted = shifted(get_peft_model(copy.deepcopy(tiny_backbone), config()), images)
    state = get_peft_model_state_dict(adapted)
    injected = inject_adapter_in_model(config(), tiny_backbone)

    outcome = set_peft_model_state_dict(injected, state)

    assert not outcome.unexpected_keys
    assert torch.equal(injected.eval()(images), adapted(images))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_misspelt_name_next_to_a_right_name_is_said(config_cls: type[PeftConfig], field: str) -> None:
    """PEFT ignores the name. A misspelt head would then be neither trained nor saved."""
    options = {"target_modules": ["conv1"], "modules_to_save": ["head"]}
    network = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3), pool=nn.Flatten(), head=nn.Linear(4, 2)))
    wrong = {**options, field: [*options[field], "haed"]}

    with pytest.warns(UserWarning, match=f"{field}: no module is called 'haed'.*Did you mean 'head'"):
        model = get_peft_model(network, config_cls(**wrong))

    model.add_adapter("other", config_cls(**options))  # finds the wrapped modules, and warns of nothing
