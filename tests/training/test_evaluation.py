from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.backbones import load_backbone
from peft_edge.training.evaluation import answers, check_saved, logits
from peft_edge.training.updates import merged_copy
from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def test_every_image_is_asked_about_once() -> None:
    """Ten images in batches of four, of which the identity gets seven right."""
    scores = torch.eye(10)
    labels = torch.arange(10)
    labels[:3] = 9
    rows = [{"pixel_values": score, "labels": label} for score, label in zip(scores, labels, strict=True)]
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare_data_loader(DataLoader(rows, batch_size=4))
    found = answers(nn.Identity(), batches, accelerator)
    assert (found.predictions, found.references) == (list(range(10)), labels.tolist())
    assert found.accuracy == pytest.approx(0.7)


def test_the_same_model_answers_the_same() -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    assert check_saved(model, merged_copy(model), images, logits(model, images)) == {
        "reloaded_max_logit_difference": 0.0
    }


def test_adapter_that_cannot_be_merged_is_checked_unmerged() -> None:
    config = ConvAdapterConfig(target_modules="dense", activation="relu")
    model, images = get_peft_model(load_backbone("mobilenetv3_small_050"), config), torch.randn(2, 3, 32, 32)
    assert check_saved(model, merged_copy(model), images, logits(model, images)) == {
        "reloaded_max_logit_difference": 0.0
    }


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_model_that_is_another_one_is_reported(change: float) -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="the reloaded model is not the one that was trained"):
        check_saved(model, model, images, logits(model, images) + change)
