from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from peft_edge.backbones import EDGE_FAMILIES, load_backbone, save_backbone
from peft_edge.backbones.stems import stem_names


def map_size(model: torch.nn.Module) -> int:
    """Height of the last feature map for a 64-pixel image."""
    with torch.no_grad():
        return model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape[-1]


@pytest.mark.parametrize("name", EDGE_FAMILIES.values())
def test_every_edge_family_can_keep_twice_the_resolution(name: str) -> None:
    assert map_size(load_backbone(name, 10)) == 2
    assert map_size(load_backbone(name, 10, small_images=True)) == 4


def test_the_branches_of_a_repvgg_stem_are_two() -> None:
    assert stem_names(timm.create_model("repvgg_a0")) == ("stem.conv_kxk.conv", "stem.conv_1x1.conv")
    assert stem_names(timm.create_model("mobilenetv2_035")) == ("conv_stem",)


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s"])
def test_a_stem_that_cannot_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no form for small images"):
        load_backbone(name, 10, small_images=True)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "repvgg_a0"])
def test_the_small_image_form_is_saved(name: str, tmp_path: Path) -> None:
    model = load_backbone(name, 10, small_images=True).eval()
    save_backbone(model, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(str(tmp_path)).eval()(images), model(images), rtol=0, atol=0)
