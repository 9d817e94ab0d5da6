"""The memory of a step of mobilenetv2_100, in MiB, as it was measured for the design."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW

from peft_edge.profiling.memory import track_memory
from peft_edge.roles import modules_with_role

MIB = 2**20


def mobilenet(method: str) -> nn.Module:
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    if method != "full":
        dense = modules_with_role(model, "dense")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=dense, use_dora=method == "dora"))
    return model.train()


FIGURES = [("full", 1227), ("lora", 1225), ("dora", 1759)]


@pytest.mark.parametrize(("method", "peak_mib"), FIGURES)
def test_figures_of_the_design(method: str, peak_mib: int) -> None:
    model = mobilenet(method)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    profile = track_memory(model, torch.empty(16, 3, 224, 224, device="meta"), optimizer=optimizer, fake=True)

    assert profile.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "peak_mib"), FIGURES)
def test_figures_of_the_design_are_those_of_a_real_step(method: str, peak_mib: int) -> None:
    model, images = mobilenet(method), torch.randn(16, 3, 224, 224)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    real = track_memory(model, images, optimizer=optimizer)
    fake = track_memory(model, images, optimizer=optimizer, fake=True)

    assert real.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.02)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
