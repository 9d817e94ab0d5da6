"""Who takes which output, against networks where one can see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_edge import ConvLoraConfig
from peft_edge.lean.dataflow import FUNCTION, PRODUCT, consumers


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.gate, self.last = nn.Sigmoid(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return self.last(x) + x


def test_layers_products_and_functions_are_told_apart() -> None:
    assert consumers(_Branches()) == {
        "conv": ["norm"],
        "norm": ["act"],
        "act": [FUNCTION, PRODUCT],
        "gate": [PRODUCT],
        "last": [FUNCTION],
    }


def test_the_model_is_left_as_it_is() -> None:
    model = _Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    consumers(model)

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_activation_inside_a_norm_takes_its_place() -> None:
    found = consumers(timm.create_model("mobilenetv2_035"))

    assert found["conv_stem"] == ["bn1"]
    assert found["bn1.act"] == ["blocks.0.0.conv_dw"]
    assert found["blocks.1.0.conv_pwl"] == ["blocks.1.0.bn3"]
    assert found["blocks.1.0.bn3"] == ["blocks.1.1.conv_pw", FUNCTION]  # the residual sum
    assert "bn1" not in found


@pytest.mark.parametrize("norm", ["frozen", "stats"])
def test_an_adapted_layer_stands_for_what_it_wraps(norm: str) -> None:
    model = timm.create_model("mobilenetv2_035")
    plain = consumers(model)

    adapted = consumers(get_peft_model(model, ConvLoraConfig(target_modules="dense", norm=norm)))

    def original(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    assert {original(name): [original(taker) for taker in takers] for name, takers in adapted.items()} == plain


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t", "regnetx_002", "ghostnet_050"])
def test_every_convolution_of_a_network_is_seen(name: str, make_backbone: Callable[[str], nn.Module]) -> None:
    model = make_backbone(name)

    found = consumers(model)

    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convolutions) <= set(found)
