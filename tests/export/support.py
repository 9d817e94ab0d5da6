"""The training loop and the adapters that several tests of exports use."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_edge import ConvLoraConfig
from peft_edge.backbones import load_backbone
from peft_edge.data import build_loader, build_transform
from peft_edge.data.embedded import load_digits_domain
from peft_edge.export.verification import input_config
from peft_edge.hub import load_pretrained

IMAGE_SIZE = 32
STEP_BATCH_SIZE = 4


def require_onnx() -> None:
    """Skip the test if a package for ONNX is not installed."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)


class Saved(NamedTuple):
    base: Path
    adapter: Path

    def load(self) -> PeftModel:
        return load_pretrained(self.adapter)


def train(model: nn.Module, steps: int, learning_rate: float) -> None:
    domain, _ = load_digits_domain(image_size=IMAGE_SIZE, seed=0)
    transform = build_transform(input_config(model, IMAGE_SIZE), train=False)
    loader = build_loader(domain.train, transform, batch_size=32, shuffle=True, seed=0)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=learning_rate)
    model.train()
    for step, batch in zip(range(steps), (batch for _ in range(99) for batch in loader), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def randomize(model: PeftModel, *, statistics: bool = True) -> PeftModel:
    """Give random values to the B matrices of the LoRA adapter, and return the model in eval mode.

    If `statistics` is True, the running statistics of BatchNorm also get random values.
    """
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if not statistics and "running_" in name:
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1, generator=generator)
        elif "lora_B" in name:
            tensor.normal_(std=0.05, generator=generator)
    return model.eval()


def adapted(base: Path, **options: object) -> PeftModel:
    config = {"r": 2, "target_modules": "dense", "norm": "frozen", "modules_to_save": ["classifier"], **options}
    return get_peft_model(load_backbone(str(base)), ConvLoraConfig(**config)).eval()
