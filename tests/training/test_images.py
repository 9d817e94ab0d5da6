from __future__ import annotations

import torch
from torch import Tensor

from peft_edge.backbones import load_backbone
from peft_edge.config import load_config
from peft_edge.data import load_task
from peft_edge.training.images import evaluation_batches, training_batches

CONFIG = load_config(["output_dir=a", "data.shift=blend", "data.image_size=32", "training.eval_batch_size=64"])


def pixels(loader) -> Tensor:
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_batches_have_the_size_that_was_asked_for_and_leave_the_random_numbers_of_training_alone() -> None:
    backbone = load_backbone(CONFIG.backbone.name, num_classes=10)
    target = load_task("digits", shift="invert", image_size=32).targets[0]
    state = torch.get_rng_state()
    trained = pixels(training_batches(CONFIG, backbone, target.train, batch_size=64))
    evaluated = pixels(evaluation_batches(CONFIG, backbone, target.validation))
    assert torch.equal(torch.get_rng_state(), state)
    assert trained.shape == (len(target.train) // 64 * 64, 3, 32, 32)
    assert evaluated.shape == (len(target.validation), 3, 32, 32)
    assert torch.equal(evaluated, pixels(evaluation_batches(CONFIG, backbone, target.validation)))
