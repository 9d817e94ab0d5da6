"""Accuracy on a split, and proof that a saved update is the model that was trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task
from peft_edge.metrics import Accuracy
from peft_edge.training.images import evaluation_batches

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answers:
    """What a model said of a split, in the order of the images, over all processes."""

    predictions: list[int]
    """The class of the largest logit; -1 where the logits are not finite."""

    references: list[int]
    """The right classes."""

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return Accuracy().compute(**vars(self))["accuracy"]


@torch.no_grad()
def answers(model: nn.Module, batches: DataLoader, accelerator: Accelerator) -> Answers:
    """Asks a model about every image once. Leaves it in eval mode.

    Args:
        model: On the accelerator's device, prepared or not.
        batches: A loader from `evaluation_batches`, prepared by the accelerator.
        accelerator: The run's.
    """
    model.eval()
    found = Answers([], [])
    for batch in batches:
        with accelerator.autocast():
            logits = model(batch["pixel_values"])
        predictions = logits.argmax(dim=-1).masked_fill(~logits.isfinite().all(dim=-1), -1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        found.predictions.extend(predictions.tolist())
        found.references.extend(references.tolist())
    return found


def answers_on_tests(model: nn.Module, config: RunConfig, task: Task, accelerator: Accelerator) -> list[Answers]:
    """Returns the answers to the source's test split, and to that of each target."""
    loaders = [evaluation_batches(config, model, domain.test) for domain in (task.source, *task.targets)]
    return [answers(model, accelerator.prepare_data_loader(loader), accelerator) for loader in loaders]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns what the model answers in eval mode: (B, num_classes) for images of shape (B, 3, H, W)."""
    model.eval()
    device = next(model.parameters()).device
    return model(images.to(device)).float().cpu()


def first_images(config: RunConfig, backbone: nn.Module, target: Domain) -> Tensor:
    """Returns the images, (B, 3, H, W), that a saved update is checked with: from the target's test split."""
    return next(iter(evaluation_batches(config, backbone, target.test)))["pixel_values"]


def check_saved(reloaded: nn.Module, merged: nn.Module | None, images: Tensor, trained: Tensor) -> dict[str, float]:
    """Compares the trained model's logits with the reloaded model's, and with those after merging the adapter.

    Args:
        reloaded: From `load_update`.
        merged: From `merged_copy`.
        images: From `first_images`, (B, 3, H, W).
        trained: (B, num_classes), the trained model's logits for them.

    Returns:
        The largest difference of a logit after reloading and, where there is an adapter that has merged, after it.

    Raises:
        RuntimeError: A difference is more than rounding.
    """
    found = {"reloaded": (logits(reloaded, images), RELOAD_TOLERANCE)}
    if merged is not None and merged is not reloaded:
        found["merged"] = (logits(merged, images), MERGE_TOLERANCE)
    scale = max(1.0, trained.abs().max().item())
    differences = {name: (answer - trained).abs().max().item() for name, (answer, _) in found.items()}
    for name, (_, tolerance) in found.items():
        # Written so that a NaN fails too.
        if not differences[name] <= tolerance * scale:
            raise RuntimeError(
                f"the {name} model is not the one that was trained: a logit differs by {differences[name]}, of at most "
                f"{scale:.3g}. Please report this with the record of the run"
            )
    return {f"{name}_max_logit_difference": difference for name, difference in differences.items()}
