"""Layer roles against the structure of networks in their papers."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_edge.roles import ROLES, modules_with_role, named_convolutions


def test_mobilenetv2_has_the_layers_of_its_paper() -> None:
    model = timm.create_model("mobilenetv2_100")
    count = {role: len(modules_with_role(model, role)) for role in ROLES}

    # Sandler et al. 2018, table 2: a stem, 17 blocks of which 16 expand, and a head convolution.
    roles = {"all-conv": 52, "depthwise": 17, "dense": 35, "pointwise": 34, "expand": 17, "project": 17}
    assert count == {**roles, "last-stage": 4}


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv4_conv_small_050", "resnet26t", "repvgg_a0"])
def test_roles_partition_the_convolutions(name: str) -> None:
    model = timm.create_model(name)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    roles = {role: set(modules_with_role(model, role)) for role in ROLES}

    assert modules_with_role(model, "all-conv") == names
    assert roles["dense"].isdisjoint(roles["depthwise"])
    assert roles["expand"].isdisjoint(roles["project"])
    assert roles["expand"] | roles["project"] <= roles["pointwise"] <= roles["dense"]


def test_squeeze_excite_is_neither_expand_nor_project() -> None:
    model = timm.create_model("mobilenetv3_small_050")
    squeeze_excite = {name for name in modules_with_role(model, "pointwise") if ".se." in name}

    assert len(squeeze_excite) == 18
    assert squeeze_excite.isdisjoint(modules_with_role(model, "expand") + modules_with_role(model, "project"))


def test_bottleneck_without_norms_has_expand_and_project() -> None:
    block = nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1))

    assert modules_with_role(block, "expand") == ["0"]
    assert modules_with_role(block, "project") == ["2"]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("mobilenetv1_100", "blocks.4.0.conv_dw", "blocks.4.1.conv_pw"),
        ("mobilenetv2_100", "blocks.6.0.conv_pw", "conv_head"),
        ("mobilenetv3_large_100", "blocks.6.0.conv", "conv_head"),
        ("mobilenetv4_conv_small", "blocks.4.0.conv", "conv_head"),
        ("efficientnet_lite0", "blocks.6.0.conv_pw", "conv_head"),
        ("fbnetc_100", "blocks.6.0.conv_pw", "conv_head"),
        ("ghostnet_050", "blocks.9.0.conv", "conv_head"),
        ("resnet10t", "layer4.0.conv1", "layer4.0.downsample.1"),
        ("repvgg_a0", "stages.3.0.conv_kxk.conv", "stages.3.0.conv_1x1.conv"),
        ("regnetx_002", "s4.b1.conv1.conv", "s4.b7.conv3.conv"),
        ("densenet121", "features.denseblock4.denselayer1.conv1", "features.denseblock4.denselayer16.conv2"),
        ("convnext_atto", "stages.3.downsample.1", "stages.3.blocks.1.mlp.fc2"),
    ],
)
def test_last_stage_extends_to_the_last_convolution(name: str, first: str, last: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = modules_with_role(model, "last-stage")
    assert (found[0], found[-1]) == (first, last)
    assert found == modules_with_role(model, "all-conv")[-len(found) :]
    assert [f"a.{name}" for name in found] == modules_with_role(nn.ModuleDict({"a": model}), "last-stage")


def test_network_without_feature_info_has_no_last_stage() -> None:
    assert modules_with_role(nn.Sequential(nn.Conv2d(1, 1, 1)), "last-stage") == []


def test_adapted_model_has_the_names_of_the_unadapted_one() -> None:
    model = timm.create_model("resnet18")
    before = [(name, roles) for name, _, roles in named_convolutions(model)]

    get_peft_model(model, LoraConfig(target_modules=["conv1"], modules_to_save=["fc"]))

    assert [(name, roles) for name, _, roles in named_convolutions(model)] == before


def test_unknown_role_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'depthwize'.*depthwise"):
        modules_with_role(nn.Conv2d(1, 1, 1), "depthwize")
