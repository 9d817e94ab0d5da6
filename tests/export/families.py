"""Export a training step for networks of all families. `python -m tests.export.families` prints the guide's table.

The networks are those in `FAMILIES`, or the timm models that are named on the command line. Each network has 5 classes,
random weights, and BatchNorm statistics that were computed on random images.
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
    """Return a network with random BatchNorm statistics, and with an adapter that changes the output."""
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
    """Export a training step of the network `name`. Return the report, or the error message if the export fails."""
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
