"""Heads of timm models: names, replacement, growth, class names."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_edge import ConvLoraConfig
from peft_edge.backbones import (
    change_classes,
    class_names,
    fingerprint,
    grow_head,
    head_names,
    replace_head,
    set_class_names,
)
from peft_edge.backbones.heads import head_layers


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


def test_model_without_classifier_has_no_head_names() -> None:
    assert head_names(timm.create_model("mobilenetv2_035", num_classes=0)) == []


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035", "repvgg_a0"])
def test_new_head_starts_at_the_loss_of_a_uniform_prediction(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    replace_head(model, 10)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.randint(10, (16,)))
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)
    weight, bias = (model.get_parameter(f"{head_names(model)[0]}.{name}") for name in ("weight", "bias"))
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not bias.any()


def test_new_head_depends_on_the_generator() -> None:
    def head(seed: int) -> torch.Tensor:
        model = timm.create_model("mobilenetv2_035")
        replace_head(model, 10, generator=torch.Generator().manual_seed(seed))
        return model.classifier.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_replace_head_keeps_dtype_pooling_and_body() -> None:
    model = timm.create_model("mobilenetv2_035", global_pool="max").bfloat16()
    stem = model.conv_stem.weight.clone()
    replace_head(model, 3)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert model.global_pool.pool_type == "max"
    assert torch.equal(model.conv_stem.weight, stem)
    assert model.num_classes == 3


def test_replace_head_refuses_bad_arguments(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found 0"):
        replace_head(tiny_backbone, 0)
    with pytest.raises(TypeError, match="made by timm, found Linear"):
        head_names(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035", "repvgg_a0", "levit_128s"])
def test_grown_head_keeps_its_rows_and_logits(name: str) -> None:
    model = timm.create_model(name, num_classes=6).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 224 if name.startswith("levit") else 32, 224 if name.startswith("levit") else 32)
    with torch.no_grad():
        expected = model(images)
        grow_head(model, 10)
        logits = model(images)
    assert model.num_classes == 10
    assert all(
        torch.equal(tensor[: len(before[key])] if tensor.ndim else tensor, before[key])
        for key, tensor in model.state_dict().items()
    )
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits[:, :6], expected)
    for _, layer in head_layers(model):
        assert layer.weight[6:].std().item() == pytest.approx(0.01, rel=0.1)
        assert not layer.bias[6:].any()
        assert "out_features=10" in repr(layer)


def test_convolutional_head_grows() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    model.classifier = nn.Conv2d(model.classifier.in_features, 3, 1, bias=False).requires_grad_(False)
    old = model.classifier.weight.clone()
    grow_head(model, 5)
    assert torch.equal(model.classifier.weight[:3], old)
    assert model.classifier(torch.randn(1, old.shape[1], 1, 1)).shape == (1, 5, 1, 1)
    assert not model.classifier.weight.requires_grad


def test_grow_head_grows_the_original_and_every_copy_in_modules_to_save(tiny_backbone: nn.Module) -> None:
    config = ConvLoraConfig(norm="stats", r=2, target_modules=["conv_stem"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_backbone, config)
    model.add_adapter("other", config)
    heads = dict(head_layers(model.get_base_model()))
    assert len(heads) == 3
    rows = {name: nn.init.normal_(layer.weight).detach().clone() for name, layer in heads.items()}
    grow_head(model, 12, generator=torch.Generator().manual_seed(0))
    for name, layer in head_layers(model.get_base_model()):
        assert torch.equal(layer.weight[:10], rows[name])
        assert layer.weight.requires_grad == ("default" in name)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 12)
    assert model.num_classes == 12


def test_new_rows_depend_on_the_generator(tiny_backbone: nn.Module) -> None:
    def rows(seed: int) -> torch.Tensor:
        model = copy.deepcopy(tiny_backbone)
        grow_head(model, 13, generator=torch.Generator().manual_seed(seed))
        return model.classifier.weight[10:]

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_grow_head_refuses_what_cannot_grow(tiny_backbone: nn.Module) -> None:
    before = fingerprint(tiny_backbone)
    with pytest.raises(ValueError, match=r"num_classes: expected at least 10, .* found 9"):
        grow_head(tiny_backbone, 9)
    with pytest.raises(ValueError, match="has no head to grow"):
        grow_head(timm.create_model("mobilenetv2_035", num_classes=0), 3)
    assert fingerprint(tiny_backbone) == before
    model = get_peft_model(tiny_backbone, LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(ValueError, match=r"classifier holds an adapter.*modules_to_save=\['classifier'\]"):
        grow_head(model, 12)


def test_change_classes_keeps_the_rows_of_known_names(tiny_backbone: nn.Module) -> None:
    set_class_names(tiny_backbone, list("abcdefghij"))
    model = get_peft_model(
        tiny_backbone, ConvLoraConfig(r=2, target_modules=["conv_stem"], modules_to_save=["classifier"])
    )
    rows = {name: nn.init.normal_(layer.weight).detach().clone() for name, layer in head_layers(model.get_base_model())}
    change_classes(model, ["j", "new", "a"], generator=torch.Generator().manual_seed(0))
    assert class_names(model.get_base_model()) == ["j", "new", "a"]
    layers = dict(head_layers(model.get_base_model()))
    assert layers.keys() == rows.keys()
    assert len(layers) == 2
    for name, layer in layers.items():
        assert torch.equal(layer.weight[[0, 2]], rows[name][[9, 0]])
        assert layer.weight[1].std() < 0.05 < rows[name].std()
        assert layer.bias.shape == (3,)
        assert layer.weight.requires_grad == ("default" in name)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_change_classes_refuses_what_it_cannot_change(tiny_backbone: nn.Module) -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="at least one name, and each name once"):
            change_classes(tiny_backbone, names)
    set_class_names(tiny_backbone, list("abcdefghij"))
    model = get_peft_model(tiny_backbone, LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(ValueError, match="classifier holds an adapter"):
        change_classes(model, ["a", "b"])
    assert class_names(model.get_base_model()) == list("abcdefghij")


def test_class_names_are_removed_when_the_head_changes(tiny_backbone: nn.Module) -> None:
    names = list("abcdefghij")
    assert class_names(tiny_backbone) is None
    set_class_names(tiny_backbone, names)
    assert class_names(tiny_backbone) == names
    assert class_names(timm.create_model("mobilenetv2_035", num_classes=10)) is None  # timm's registry is unchanged
    grow_head(tiny_backbone, 11)
    assert class_names(tiny_backbone) is None
    set_class_names(tiny_backbone, [*names, "k"])
    replace_head(tiny_backbone, 11)
    assert class_names(tiny_backbone) is None


def test_class_names_must_match_the_number_of_classes(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="each of the 10 classes of the head, found 2"):
        set_class_names(tiny_backbone, ["a", "b"])
    set_class_names(tiny_backbone, list("abcdefghij"))
    tiny_backbone.reset_classifier(4)
    with pytest.raises(ValueError, match="each of the 4 classes of the head, found 10"):
        class_names(tiny_backbone)
