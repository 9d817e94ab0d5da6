from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from peft_edge.backbones import head_names, replace_head


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenetv3_small_050", ["classifier"]),
        ("ghostnet_050", ["classifier"]),
        ("resnet10t", ["fc"]),
        ("repvgg_a0", ["head.fc"]),
        ("levit_128s", ["head", "head_dist"]),  # distilled: two classifiers, each a norm and a linear layer
    ],
)
def test_head_names(name: str, expected: list[str]) -> None:
    assert head_names(timm.create_model(name)) == expected


def test_a_model_without_classifier_has_no_head_names() -> None:
    assert head_names(timm.create_model("mobilenetv2_035", num_classes=0)) == []


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035", "repvgg_a0"])
def test_a_new_head_starts_at_the_uniform_loss(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    replace_head(model, 10)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.randint(10, (16,)))
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)
    weight, bias = (model.get_parameter(f"{head_names(model)[0]}.{name}") for name in ("weight", "bias"))
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not bias.any()


def test_the_new_head_comes_from_the_generator() -> None:
    def head(seed: int) -> torch.Tensor:
        model = timm.create_model("mobilenetv2_035")
        replace_head(model, 10, generator=torch.Generator().manual_seed(seed))
        return model.classifier.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_the_new_head_keeps_dtype_pooling_and_body() -> None:
    model = timm.create_model("mobilenetv2_035", global_pool="max").bfloat16()
    stem = model.conv_stem.weight.clone()
    replace_head(model, 3)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert model.global_pool.pool_type == "max"
    assert torch.equal(model.conv_stem.weight, stem)
    assert model.num_classes == 3


def test_bad_arguments_are_named(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found 0"):
        replace_head(tiny_backbone, 0)
    with pytest.raises(TypeError, match="made by timm, found Linear"):
        head_names(nn.Linear(2, 2))
