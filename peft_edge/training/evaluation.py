"""Compute predictions and accuracies, check the saved adapter or model, and measure the change of each kernel."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_edge._compat import dataset_fingerprint
from peft_edge.backbones import fingerprint
from peft_edge.config import RunConfig
from peft_edge.data import Domain, Task
from peft_edge.files import atomic_write
from peft_edge.metrics import Accuracy, Retention, average_forgetting, harmonic_mean
from peft_edge.records import KernelChange
from peft_edge.roles import named_convolutions
from peft_edge.training.batches import evaluation_batches, timm_config
from peft_edge.training.run_folder import cache_folder, cache_key

logger = logging.getLogger(__name__)

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-3

TARGET, SOURCE = "test accuracy", "source test accuracy"
TARGET_BEFORE, SOURCE_BEFORE = f"{TARGET} without update", f"{SOURCE} without update"


@dataclass(frozen=True)
class Predictions:
    """The predicted and the true class of each image of a split, such as the test images of a domain.

    The classes are in the order of the images, and were gathered from all processes.
    """

    predictions: list[int]  # the class with the largest logit; -1 if a logit is not finite
    references: list[int]

    @property
    def accuracy(self) -> float:
        """The fraction of images whose predicted class is the true class."""
        return Accuracy().compute(**vars(self))["accuracy"]


@torch.no_grad()
def predict(model: nn.Module, batches: DataLoader, accelerator: Accelerator, *, stage: str) -> Predictions:
    """Predict the class of every image with `model` in eval mode, and gather the predictions of all processes.

    `accelerator` must have prepared `batches`. `model` must be on the device of `accelerator`, and stays in eval mode
    after the call. `stage` is the text of the progress bar.
    """
    model.eval()
    found = Predictions([], [])
    is_quiet = not accelerator.is_main_process
    for batch in tqdm(batches, desc=stage, unit="batch", leave=False, disable=is_quiet):
        with accelerator.autocast():
            logits = model(batch["pixel_values"])
        predictions = logits.argmax(dim=-1).masked_fill(~logits.isfinite().all(dim=-1), -1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        found.predictions.extend(predictions.tolist())
        found.references.extend(references.tolist())
    return found


def predict_tests(model: nn.Module, config: RunConfig, task: Task, accelerator: Accelerator) -> list[Predictions]:
    """Return the predictions for the test images of the source domain, then for those of each target domain."""
    return [_predict_test(model, config, domain, accelerator) for domain in (task.source, *task.targets)]


def _predict_test(model: nn.Module, config: RunConfig, domain: Domain, accelerator: Accelerator) -> Predictions:
    loader = accelerator.prepare_data_loader(evaluation_batches(config, model, domain.test))
    return predict(model, loader, accelerator, stage="testing")


def predict_source_tests(
    source: nn.Module, config: RunConfig, task: Task, accelerator: Accelerator
) -> list[Predictions]:
    """Return the predictions of the source model for the test images of the source domain and of each target domain.

    The source model is the network before adaptation. Many runs have the same source model, so its predictions are
    computed once and stored in the cache folder that the runs share. If this folder cannot be written, the predictions
    are returned without being stored.
    """
    found = []
    for domain in (task.source, *task.targets):
        key = cache_key(
            config,
            accelerator.device.type,
            model=fingerprint(source),
            images=dataset_fingerprint(domain.test),
            transform=timm_config(config, source),
            batch_size=config.training.eval_batch_size,
            mixed_precision=config.training.mixed_precision,
            num_processes=accelerator.num_processes,
        )
        file = cache_folder(config) / "tests" / f"{key[:16]}.json"
        with _locked(file) if accelerator.is_main_process else nullcontext(False) as may_write:
            # All processes must take the same branch, because `predict` needs all of them.
            (known,) = broadcast_object_list([_read_predictions(file)])
            if known is None:
                known = _predict_test(source, config, domain, accelerator)
                if may_write:
                    with atomic_write(file) as unfinished:
                        unfinished.write_text(json.dumps(vars(known)), encoding="utf-8")
        found.append(known)
    return found


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Lock `file` against other runs during the `with` block, and yield whether the block may write `file`.

    If `file` already contains predictions, take no lock and yield False. If the folder of `file` cannot be written, log
    a warning and yield False.
    """
    with ExitStack() as stack:
        may_write = False
        if _read_predictions(file) is None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(file.with_name(f"{file.name}.lock")))
                may_write = True
            except OSError:  # no permission, or a read-only file system
                logger.warning("%s cannot be written, so the next run tests the source model again", file)
        yield may_write


def _read_predictions(file: Path) -> Predictions | None:
    try:
        return Predictions(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # the caller replaces a missing or damaged file
        return None


def results(predictions: list[list[Predictions]]) -> dict[str, object]:
    """Return the test results of a run as a dict: accuracies, retention, forgetting and a harmonic mean.

    `predictions[0]` is the result of `predict_tests` for the source model. `predictions[i]` is the result for the model
    after adaptation to target i, where targets are counted from 1. With `method="none"`, nothing is adapted, and there
    is only `predictions[0]`. The entry with the key `TARGET` is the accuracy on the test images of all targets
    together. The entry `harmonic mean` is computed from the final accuracies on the targets and on the source. If the
    model was adapted to several targets, the dict also contains the list `accuracies`. Its row 0 contains the accuracy
    of the source model on the source. Its row i contains the accuracies of the model after adaptation to target i: on
    the source, then on the targets 1 to i.
    """
    (source_before, *targets_before), (source_after, *targets_after) = predictions[0], predictions[-1]
    # With `method="none"`, the source model is also the final model.
    rows = predictions if len(predictions) > 1 else predictions * 2
    # Row i contains the accuracies of the model after adaptation to target i: on the source (column 0), then on the
    # targets 1 to i.
    accuracies = [[split.accuracy for split in row[: step + 1]] for step, row in enumerate(rows)]
    values: dict[str, object] = {
        TARGET: _pooled(targets_after).accuracy,
        SOURCE: source_after.accuracy,
        TARGET_BEFORE: _pooled(targets_before).accuracy,
        SOURCE_BEFORE: source_before.accuracy,
        **Retention().compute(**vars(source_after), previous=source_before.predictions),
        "forgetting": average_forgetting(accuracies),
        "harmonic mean": harmonic_mean(_pooled(targets_after).accuracy, source_after.accuracy),
    }
    return values if len(accuracies) == 2 else {**values, "accuracies": accuracies}


def _pooled(splits: list[Predictions]) -> Predictions:
    return Predictions(
        [prediction for split in splits for prediction in split.predictions],
        [reference for split in splits for reference in split.references],
    )


def first_images(config: RunConfig, backbone: nn.Module, target: Domain) -> Tensor:
    """Return the images (B, 3, H, W) of the first evaluation batch of the target's test split."""
    return next(iter(evaluation_batches(config, backbone, target.test)))["pixel_values"]


@torch.no_grad()
def eval_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return float32 logits (B, num_classes) on the CPU for images (B, 3, H, W). Put `model` into eval mode."""
    model.eval()
    device = next(model.parameters()).device
    return model(images.to(device)).float().cpu()


def check_saved(reloaded: nn.Module, merged: nn.Module | None, images: Tensor, trained: Tensor) -> dict[str, float]:
    """Check that `reloaded` and `merged` compute the same logits for `images` as the trained model.

    `reloaded` was loaded from the files that the run saved. `merged` is a copy of `reloaded` with the adapter merged.
    `trained` contains the logits (B, num_classes) of the trained model for `images`. If `merged` is None or the same
    object as `reloaded`, only `reloaded` is checked.

    Returns:
        A dict with the largest absolute difference from `trained` for each checked model. The keys are
        `reloaded_max_logit_difference` and `merged_max_logit_difference`.

    Raises:
        RuntimeError: If a difference is NaN, or exceeds the tolerance times `max(1, trained.abs().max())`. The
            tolerance is `RELOAD_TOLERANCE` for `reloaded` and `MERGE_TOLERANCE` for `merged`.
    """
    found = {"reloaded": (eval_logits(reloaded, images), RELOAD_TOLERANCE)}
    if merged is not None and merged is not reloaded:
        found["merged"] = (eval_logits(merged, images), MERGE_TOLERANCE)
    scale = max(1.0, trained.abs().max().item())
    differences = {}
    for name, (logits, tolerance) in found.items():
        difference = differences[f"{name}_max_logit_difference"] = (logits - trained).abs().max().item()
        # Unlike `>`, `not <=` is also true for NaN.
        if not difference <= tolerance * scale:
            raise RuntimeError(
                f"the {name} model is not the one that was trained: a logit differs by {difference}, and the largest "
                f"logit is {scale:.3g}. Please report this with the record of the run"
            )
    return differences


@torch.no_grad()
def kernel_changes(source: nn.Module, updated: nn.Module) -> dict[str, KernelChange]:
    """Return a dict from layer name to `KernelChange` for each convolution whose kernel differs in the two models.

    `updated` is `source` after adaptation, with any adapter merged. Let `old` and `new` be the kernels of a layer in
    `source` and in `updated`, reshaped to (C_out, -1), and `change` = `new` - `old`. Then relative_norm = |change|_F /
    |old|_F and stable_rank = |change|_F² / |change|_2², with the Frobenius norm |.|_F and the spectral norm |.|_2.

    >>> source = nn.Sequential(nn.Conv2d(3, 8, 1))
    >>> updated = nn.Sequential(nn.Conv2d(3, 8, 1))
    >>> _ = nn.init.constant_(source[0].weight, 1.0), nn.init.constant_(updated[0].weight, 1.5)
    >>> kernel_changes(source, updated)
    {'0': KernelChange(kind='pointwise', relative_norm=0.5, stable_rank=1.0)}
    """
    before = {name: conv.weight for name, conv, _ in named_convolutions(source)}
    changes = {}
    for name, conv, roles in named_convolutions(updated):
        old = before[name].double().flatten(1)
        change = conv.weight.to(old).flatten(1) - old
        if change.any():
            kind = next((role for role in ("depthwise", "pointwise", "dense") if role in roles), "grouped")
            # The eigenvalues of `wide @ wide.T` are the squared singular values of `change`. `wide.T @ wide` has the
            # same non-zero eigenvalues, but is larger.
            wide = change if change.shape[0] <= change.shape[1] else change.T
            squares = torch.linalg.eigvalsh(wide @ wide.T)
            norm, rank = change.norm() / old.norm(), squares.sum() / squares[-1]
            # The JSON record of the run contains these two values for every changed layer. Four digits keep it small.
            changes[name] = KernelChange(
                kind=kind, relative_norm=float(f"{norm:.4g}"), stable_rank=float(f"{rank:.4g}")
            )
    return changes
