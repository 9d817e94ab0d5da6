"""An exported training step and images, for the tests of the example programs that train on a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from peft_edge import ConvLoraConfig
from peft_edge.backbones import load_backbone, save_backbone, set_class_names
from peft_edge.export.device import export_train_step

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 40, 30)}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an exported training step, and with images of three colours.

    The class of an image is its colour. The images have different sizes.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("device")
    network = load_backbone("test_efficientnet", 3)
    set_class_names(network, list(COLOURS))
    with torch.no_grad():
        for _ in range(30):  # update the statistics of BatchNorm to plausible values
            network.train()(1.5 * torch.randn(16, 3, 1, 1) + torch.randn(16, 3, 32, 32))
    save_backbone(network.eval(), folder / "base")
    config = ConvLoraConfig(r=2, target_modules="dense", norm="frozen", modules_to_save=["classifier"])
    model = get_peft_model(load_backbone(str(folder / "base")), config).eval()
    export_train_step(model, folder / "step", image_size=32, batch_size=4, optimizer="adamw", max_grad_norm=1.0)
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for index in range(4):
            pixels = np.clip(generator.normal(colour, 30, (40 + 7 * index, 52, 3)), 0, 255).astype(np.uint8)
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    return folder
