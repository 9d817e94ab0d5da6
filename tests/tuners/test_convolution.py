"""What a convolution must be to be adapted, and merging into its kernel, for every tuner."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig, get_peft_model
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

Config = Callable[..., PeftConfig]


@pytest.mark.parametrize("conv", [StdConv2d(4, 6, 3), ScaledStdConv2d(4, 6, 3), weight_norm(nn.Conv2d(4, 6, 3))])
def test_a_layer_that_is_not_a_plain_convolution_is_refused_by_name(config: Config, conv: nn.Module) -> None:
    model = nn.Sequential()
    model.conv = conv

    with pytest.raises(ValueError, match=rf"'conv': {type(conv).__name__} is not a plain convolution.*exclude_modules"):
        get_peft_model(model, config())


def test_safe_merge_leaves_the_layer_alone_where_the_adapter_is_broken(config: Config) -> None:
    conv = nn.Conv2d(4, 4, 3)
    model = get_peft_model(nn.Sequential(copy.deepcopy(conv)), config())
    layer = model.base_model.model[0]
    getattr(layer, layer.adapter_layer_names[0])["default"].weight.data[0] = float("nan")

    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)

    assert torch.equal(layer.base_layer.weight, conv.weight)


def test_unmerging_puts_back_the_same_bits_after_two_merges(config: Config) -> None:
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
