from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.backbones import load_backbone
from peft_edge.training.evaluation import accuracy, check_saved, load_update, logits, save_update


def test_accuracy_counts_every_image_once() -> None:
    """Ten images in batches of four, of which the identity gets seven right."""
    scores = torch.eye(10)
    labels = torch.arange(10)
    labels[:3] = 9
    rows = [{"pixel_values": score, "labels": label} for score, label in zip(scores, labels, strict=True)]
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare_data_loader(DataLoader(rows, batch_size=4))
    assert accuracy(nn.Identity(), batches, accelerator) == pytest.approx(0.7)


def test_saved_model_answers_the_same(tmp_path: Path) -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    model.to(memory_format=torch.channels_last)
    save_update(model, tmp_path / "model")
    reloaded = load_update(tmp_path / "model", torch.device("cpu"))
    assert check_saved(reloaded, images, logits(model, images)) == {"reloaded_max_logit_difference": 0.0}


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_model_that_is_another_one_is_reported(change: float) -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="the reloaded model is not the one that was trained"):
        check_saved(model, images, logits(model, images) + change)
