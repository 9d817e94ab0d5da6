"""A small network trained on digits, an adapter for it, and digits to compare both on."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_edge import ConvLoraConfig
from peft_edge.backbones import load_backbone, save_backbone, set_class_names
from peft_edge.export.verification import Images, read_images
from peft_edge.hub import save_adapter
from tests.export.support import IMAGE_SIZE, Saved, train


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A trained base, and an adapter whose weights, head and BatchNorm statistics differ from the base's."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    base = load_backbone("test_efficientnet", 10)
    set_class_names(base, [str(digit) for digit in range(10)])
    train(base, 40, 1e-2)
    save_backbone(base, folder / "base")
    config = ConvLoraConfig(norm="stats", r=2, target_modules="all-conv", modules_to_save=["classifier"])
    adapted = get_peft_model(load_backbone(str(folder / "base")), config)
    train(adapted, 4, 1e-3)
    save_adapter(adapted, folder / "adapter")
    return Saved(folder / "base", folder / "adapter")


@pytest.fixture(scope="session")
def digits(saved: Saved) -> Images:
    return read_images("digits", load_backbone(str(saved.base)), image_size=IMAGE_SIZE)
