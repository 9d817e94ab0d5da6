"""Accuracy on a split, and proof that a saved update is the model that was trained.

What a run has gained and lost, from the predictions of its models.

What an update has done to each kernel: how much it has moved, and in how many directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task
from peft_edge.metrics import Accuracy, Retention, average_forgetting, harmonic_mean
from peft_edge.records import KernelChange
from peft_edge.roles import named_convolutions
from peft_edge.training.batches import evaluation_batches

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Predictions:
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
def predict(model: nn.Module, batches: DataLoader, accelerator: Accelerator) -> Predictions:
    """Asks a model about every image once. Leaves it in eval mode.

    Args:
        model: On the accelerator's device, prepared or not.
        batches: A loader from `evaluation_batches`, prepared by the accelerator.
        accelerator: The run's.
    """
    model.eval()
    found = Predictions([], [])
    for batch in batches:
        with accelerator.autocast():
            logits = model(batch["pixel_values"])
        predictions = logits.argmax(dim=-1).masked_fill(~logits.isfinite().all(dim=-1), -1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        found.predictions.extend(predictions.tolist())
        found.references.extend(references.tolist())
    return found


def predict_tests(model: nn.Module, config: RunConfig, task: Task, accelerator: Accelerator) -> list[Predictions]:
    """Returns the predictions to the source's test split, and to that of each target."""
    loaders = [evaluation_batches(config, model, domain.test) for domain in (task.source, *task.targets)]
    return [predict(model, accelerator.prepare_data_loader(loader), accelerator) for loader in loaders]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns what the model predictions in eval mode: (B, num_classes) for images of shape (B, 3, H, W)."""
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


TARGET, SOURCE = "test accuracy", "source test accuracy"
TARGET_BEFORE, SOURCE_BEFORE = f"{TARGET} without update", f"{SOURCE} without update"


def results(predictions: list[list[Predictions]]) -> dict[str, Any]:
    """Returns the figures of a run by their names in the record.

    Args:
        predictions: For the source model, and then for the model after each target: the predictions to the source's test
            split, and to that of every target.
    """
    (source_before, *targets_before), (source_after, *targets_after) = predictions[0], predictions[-1]
    # Without an update, the model afterwards is the one from before.
    rows = predictions if len(predictions) > 1 else predictions * 2
    # After each step, the domains that it has seen.
    accuracies = [[answer.accuracy for answer in row[: step + 1]] for step, row in enumerate(rows)]
    figures = {
        TARGET: _pooled(targets_after).accuracy,
        SOURCE: source_after.accuracy,
        TARGET_BEFORE: _pooled(targets_before).accuracy,
        SOURCE_BEFORE: source_before.accuracy,
        **Retention().compute(**vars(source_after), previous=source_before.predictions),
        "forgetting": average_forgetting(accuracies),
        "harmonic mean": harmonic_mean(_pooled(targets_after).accuracy, source_after.accuracy),
    }
    return figures if len(accuracies) == 2 else {**figures, "accuracies": accuracies}


def _pooled(parts: list[Predictions]) -> Predictions:
    return Predictions(
        [prediction for part in parts for prediction in part.predictions],
        [reference for part in parts for reference in part.references],
    )


_KINDS = ("depthwise", "pointwise", "dense")


@torch.no_grad()
def kernel_changes(source: nn.Module, updated: nn.Module) -> dict[str, KernelChange]:
    """Compares the convolutions of two models.

    A kernel (C_out, C_in/g, *kernel) is read as a matrix (C_out, K), as the adapters read it.

    Args:
        source: The model from before.
        updated: The same with its update merged.

    Returns:
        The change of each convolution that has changed, by its name.
    """
    before = {name: conv.weight for name, conv, _ in named_convolutions(source)}
    changes = {}
    for name, conv, roles in named_convolutions(updated):
        old = before[name].double().flatten(1)
        change = conv.weight.to(old).flatten(1) - old
        if change.any():
            changes[name] = KernelChange(
                kind=next((kind for kind in _KINDS if kind in roles), "grouped"),
                relative_norm=_rounded(change.norm() / old.norm()),
                stable_rank=_rounded(_stable_rank(change)),
            )
    return changes


def _stable_rank(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The squares of the singular values, from the smaller of the two products.
    squares = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.sum() / squares[-1]


def _rounded(value: Tensor) -> float:
    """To four digits: every run's record has them for every layer."""
    return float(f"{value.item():.4g}")
