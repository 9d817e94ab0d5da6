"""Accuracy on a split, and proof that a saved update is the model that was trained."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_edge.backbones import load_backbone, save_backbone
from peft_edge.config import RunConfig
from peft_edge.data import Task
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.metrics import Accuracy
from peft_edge.training.images import evaluation_batches

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-3


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, accelerator: Accelerator) -> float:
    """Returns the share of images that are classified right, over all processes. Leaves the model in eval mode.

    Args:
        model: On the accelerator's device, prepared or not.
        batches: A loader from `evaluation_batches`, prepared by the accelerator.
        accelerator: The run's.
    """
    model.eval()
    metric = Accuracy()
    for batch in batches:
        with accelerator.autocast():
            predictions = model(batch["pixel_values"]).argmax(dim=-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=predictions, references=references)
    return metric.compute()["accuracy"]


def test_accuracies(model: nn.Module, config: RunConfig, task: Task, accelerator: Accelerator) -> tuple[float, float]:
    """Returns the accuracy on the target's test split and on the source's."""
    loaders = [evaluation_batches(config, model, domain.test) for domain in (task.target, task.source)]
    on_target, on_source = (accuracy(model, accelerator.prepare_data_loader(loader), accelerator) for loader in loaders)
    return on_target, on_source


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns what the model answers in eval mode: (B, num_classes) for images of shape (B, 3, H, W)."""
    model.eval()
    device = next(model.parameters()).device
    return model(images.to(device)).float().cpu()


def save_update(model: nn.Module, folder: Path) -> None:
    """Saves the adapter, or the whole model where the method has none."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder)
    else:
        save_backbone(model, folder)


def load_update(folder: Path, device: torch.device) -> nn.Module:
    """Loads what `save_update` wrote into a fresh model."""
    model = load_pretrained(folder) if (folder / CONFIG_NAME).exists() else load_backbone(str(folder))
    return model.to(device).to(memory_format=torch.channels_last)


def first_images(config: RunConfig, backbone: nn.Module, task: Task) -> Tensor:
    """Returns the images, (B, 3, H, W), that a saved update is checked with: from the target's test split."""
    return next(iter(evaluation_batches(config, backbone, task.target.test)))["pixel_values"]


def check_saved(reloaded: nn.Module, images: Tensor, trained: Tensor) -> dict[str, float]:
    """Compares the trained model's logits with the reloaded model's, and with those after merging the adapter.

    Args:
        reloaded: From `load_update`; left as it is.
        images: From `first_images`, (B, 3, H, W).
        trained: (B, num_classes), the trained model's logits for them.

    Returns:
        The largest difference of a logit after reloading and, where there is an adapter, after merging.

    Raises:
        RuntimeError: A difference is more than rounding.
    """
    answers = {"reloaded": (logits(reloaded, images), RELOAD_TOLERANCE)}
    if isinstance(reloaded, PeftModel):
        merged = copy.deepcopy(reloaded).merge_and_unload(safe_merge=True)
        answers["merged"] = (logits(merged, images), MERGE_TOLERANCE)
    scale = max(1.0, trained.abs().max().item())
    differences = {name: (answer - trained).abs().max().item() for name, (answer, _) in answers.items()}
    for name, (_, tolerance) in answers.items():
        # Written so that a NaN fails too.
        if not differences[name] <= tolerance * scale:
            raise RuntimeError(
                f"the {name} model is not the one that was trained: a logit differs by {differences[name]}, of at most "
                f"{scale:.3g}. Please report this with the record of the run"
            )
    return {f"{name}_max_logit_difference": difference for name, difference in differences.items()}
