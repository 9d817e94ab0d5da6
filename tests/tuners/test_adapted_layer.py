"""For every tuner: mixed batches, rejected layers, and merging."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig, get_peft_model
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.tuners.support import shifted

Config = Callable[..., PeftConfig]


@pytest.fixture
def model(config: Config, small: nn.Module, images: Tensor) -> nn.Module:
    """Return a model with two very different adapters, each with its own head."""
    model = get_peft_model(small, config(modules_to_save=["classifier"]))
    model.add_adapter("dark", config(modules_to_save=["classifier"], target_modules="pointwise", norm="affine"))
    for name, scale in {"default": 2.0, "dark": 0.1}.items():
        model.set_adapter(name)
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
        shifted(model, images, scale)
    return model


def test_mixed_batch_applies_each_samples_adapter(model: nn.Module, images: Tensor) -> None:
    # In double precision: single rows round differently from whole batches, and the layers amplify the difference.
    model, images, expected = model.double(), images.double(), {}
    for name in ("default", "dark"):
        model.set_adapter(name)
        expected[name] = model(images)
    with model.disable_adapter():
        expected["__base__"] = model(images)
    names = ["dark", "__base__", "default", "dark"]

    mixed = model(images, adapter_names=names)

    assert not torch.allclose(expected["default"], expected["dark"], atol=1e-2)
    wanted = torch.stack([expected[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, wanted)
    torch.testing.assert_close(model(images), expected["dark"])


def test_invalid_adapter_names_are_rejected(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter.*: bright, light"):
        model(images, adapter_names=["light", "bright", "dark", "dark"])
    with pytest.raises(ValueError, match="got 3 and 4"):
        model(images, adapter_names=["dark"] * 3)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(images, adapter_names=["dark"] * 4)


def test_mixed_batch_with_merged_adapters_is_rejected(config: Config, small: nn.Module, images: Tensor) -> None:
    model = get_peft_model(small, config(target_modules="dense")).eval()
    model.merge_adapter()

    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(images, adapter_names=["default"] * 4)


@pytest.mark.parametrize("conv", [StdConv2d(4, 6, 3), ScaledStdConv2d(4, 6, 3), weight_norm(nn.Conv2d(4, 6, 3))])
def test_layer_that_is_no_plain_convolution_is_rejected_by_name(config: Config, conv: nn.Module) -> None:
    model = nn.Sequential()
    model.conv = conv

    with pytest.raises(ValueError, match=rf"'conv': {type(conv).__name__} is not a plain convolution.*exclude_modules"):
        get_peft_model(model, config())


def test_safe_merge_of_a_broken_adapter_keeps_the_base_layer(config: Config) -> None:
    conv = nn.Conv2d(4, 4, 3)
    model = get_peft_model(nn.Sequential(copy.deepcopy(conv)), config())
    layer = model.base_model.model[0]
    getattr(layer, layer.adapter_layer_names[0])["default"].weight.data[0] = float("nan")

    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)

    assert torch.equal(layer.base_layer.weight, conv.weight)


def test_unmerging_after_two_merges_restores_the_same_bits(config: Config) -> None:
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 9, 9)
    model = get_peft_model(nn.Sequential(copy.deepcopy(conv)), config()).eval()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)

    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()

    assert torch.equal(model.base_model.model[0].base_layer.weight, conv.weight)
    torch.testing.assert_close(model(x), expected)
