"""The source stage: the model that runs adapt, trained once and then shared by every run that asks for the same one."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import set_seed
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from peft_edge.backbones import fingerprint, load_backbone, save_backbone, set_class_names
from peft_edge.config import RunConfig
from peft_edge.data import Task
from peft_edge.files import atomic_write
from peft_edge.training.batches import training_batches
from peft_edge.training.run_folder import cache_folder


def new_backbone(config: RunConfig, num_classes: int) -> nn.Module:
    """Builds the backbone with the weights that the source stage starts from."""
    set_seed(config.seed)
    return load_backbone(
        config.backbone.name,
        num_classes,
        pretrained=config.backbone.pretrained,
        checkpoint=config.backbone.checkpoint,
        small_images=config.backbone.small_images,
    )


def source_model(config: RunConfig, task: Task, device: torch.device) -> nn.Module:
    """Returns the source model, in channels_last: from the cache, or trained and put there.

    It is trained by one process while the others wait, so it does not depend on their number. Two runs that need the
    same model at the same time train it once.

    Raises:
        ValueError: The training diverged, or there are fewer images than one batch.
        OSError: The cache cannot be written.
    """
    model = new_backbone(config, task.source.num_classes)
    set_class_names(model, task.source.class_names)
    # Weights of the Hub as they are need no copy: their name loads them anywhere.
    if config.source.epochs > 0 or not config.backbone.pretrained or config.backbone.small_images:
        folder = cache_folder(config) / "sources" / _recipe(config, task, model, device)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A lock of the system's: it is free again when its process dies.
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                if config.source.epochs > 0:
                    _train(model, config, task, device)
                with atomic_write(folder) as unfinished:
                    save_backbone(model, unfinished)
        model = load_backbone(str(folder))
    return model.to(device).to(memory_format=torch.channels_last)


def _recipe(config: RunConfig, task: Task, model: nn.Module, device: torch.device) -> str:
    """A fingerprint of everything that the trained weights depend on."""
    recipe = {
        "backbone": config.backbone.model_dump(),
        "initial_weights": fingerprint(model),
        "data": task.source.fingerprint,
        "image_size": config.data.image_size,
        "source": config.source.model_dump(),
        "seed": config.seed,
        "device": device.type,
        "num_threads": config.num_threads,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _train(model: nn.Module, config: RunConfig, task: Task, device: torch.device) -> None:
    recipe = config.source
    batches = training_batches(config, model, task.source.train, batch_size=recipe.batch_size)
    model.to(device).to(memory_format=torch.channels_last).train()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms_and_biases = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": norms_and_biases},
    ]
    optimizer = SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    total_steps = recipe.epochs * len(batches)
    if total_steps < 2:
        raise ValueError(
            f"source.epochs: {len(task.source.train)} images in batches of {recipe.batch_size} make {total_steps} "
            f"steps in {recipe.epochs} epochs, expected at least 2: raise source.epochs or lower source.batch_size"
        )
    # torch divides by the length of the way up, which a fifth of five steps makes zero.
    pct_start = 0.4 if total_steps == 5 else 0.2
    schedule = OneCycleLR(optimizer, recipe.learning_rate, total_steps, pct_start=pct_start, cycle_momentum=False)
    sampler: Any = batches.sampler
    with tqdm(total=total_steps, desc="source model", unit="step") as bar:
        for epoch in range(recipe.epochs):
            sampler.set_epoch(epoch)
            for batch in batches:
                loss = F.cross_entropy(model(batch["pixel_values"].to(device)), batch["labels"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the source model diverged in epoch {epoch + 1} (loss {loss.item()}): lower source.learning_rate, "
                    f"which is {recipe.learning_rate}"
                )
