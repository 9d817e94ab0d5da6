"""Export a training step of one network of each family. `python -m tests.export.families` prints the guide's table.

Each network has random weights, statistics of BatchNorm from random images, and 5 classes. Options after the command
are names of timm models, by default one of each family.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model

from peft_edge import ConvLoraConfig
from peft_edge.backbones import EDGE_FAMILIES, head_names, load_backbone
from peft_edge.export.device import StepReport, export_train_step

IMAGE_SIZE, BATCH_SIZE = 64, 4
OTHERS = {
    "efficientnet": "test_efficientnet",
    "tf_efficientnet_lite": "tf_efficientnet_lite0",
    "convnext": "convnext_atto",
}
FAMILIES = {**EDGE_FAMILIES, **OTHERS}


def adapted_network(name: str, target_modules: Literal["dense", "all-conv"]) -> PeftModel:
    """Return a network with an adapter that is not zero."""
    torch.manual_seed(0)
    network = load_backbone(name, 5)
    with torch.no_grad():
        for _ in range(5):
            network.train()(torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE) + torch.randn(8, 3, 1, 1))
    config = ConvLoraConfig(r=2, target_modules=target_modules, norm="frozen", modules_to_save=head_names(network))
    model = get_peft_model(network, config).eval()
    with torch.no_grad():
        for parameter_name, value in model.named_parameters():
            if "lora_B" in parameter_name:
                value.normal_(std=0.01)
    return model


def export_family(name: str, target_modules: Literal["dense", "all-conv"] = "all-conv") -> StepReport | str:
    """Return the report of the export, or the message of the error that refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = adapted_network(name, target_modules)
            return export_train_step(model, Path(folder) / "step", image_size=IMAGE_SIZE, batch_size=BATCH_SIZE)
        except (ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _named = {name: name for name in sys.argv[1:]} or FAMILIES
    for _family, _name in _named.items():
        for _target in ("dense", "all-conv"):
            print(_family, _name, _target, export_family(_name, _target), sep=" | ", flush=True)
