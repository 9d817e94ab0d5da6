"""Train the source model (the network before adaptation) once, and share it among runs with equal source settings."""

from __future__ import annotations

import logging
import math
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, skip_first_batches
from accelerate.utils import set_seed
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from peft_edge.backbones import fingerprint, load_backbone, save_backbone, set_class_names
from peft_edge.backbones.heads import as_timm_model, replace_head
from peft_edge.config import RunConfig
from peft_edge.config.schema import BackboneConfig
from peft_edge.data import Task
from peft_edge.files import atomic_write, remove
from peft_edge.optim import decay_groups
from peft_edge.training.batches import augmentation_key, set_epoch, set_run_preprocessing, training_batches
from peft_edge.training.loop import termination_deferred
from peft_edge.training.run_folder import cache_folder, cache_key

logger = logging.getLogger(__name__)

Say = Callable[[str], object]
"""A function that shows a message to the user, such as `print`."""


def new_backbone(config: RunConfig, num_classes: int, *, say: Say = lambda message: None) -> nn.Module:
    """Set the random seed, and return the backbone with the weights from which the source model is trained.

    Weights are loaded if `backbone.pretrained` or `backbone.checkpoint` is set. If the loaded weights have a different
    number of classes than `num_classes`, the head is replaced, and `say` is called with a message about the new head.
    """
    set_seed(config.seed)
    options = config.backbone
    if not (options.pretrained or options.checkpoint):
        return load_backbone(num_classes=num_classes, **options.model_dump())
    model = as_timm_model(load_backbone(**options.model_dump()))
    if model.num_classes != num_classes:
        say(f"new head for {num_classes} classes: the loaded weights have {model.num_classes:,} classes")
        replace_head(model, num_classes)
    return model


def source_model(config: RunConfig, task: Task, device: torch.device, *, say: Say = lambda message: None) -> nn.Module:
    """Train the source model (the network before adaptation) or load it from the cache.

    The returned model is on `device` in channels_last, and its `pretrained_cfg` has the preprocessing of the run. If
    `source.epochs` is 0, the model is the backbone with its initial weights.

    One process trains the model, so the model does not depend on the number of processes. All other processes that need
    the same model wait, including processes of other runs. Interrupted training continues from its newest checkpoint,
    and gives the same weights, bit for bit, as uninterrupted training.

    Raises:
        ValueError: If the loss is not finite, training has fewer than two steps, or the images do not fill one batch.
        OSError: If the cache cannot be written.
    """
    model = new_backbone(config, task.source.num_classes, say=say)
    set_class_names(model, task.source.class_names)
    # Unmodified weights from the Hub need no copy in the cache, because a saved adapter refers to them by their Hub id.
    is_unmodified = config.backbone == BackboneConfig(name=config.backbone.name, pretrained=True)
    if config.source.epochs > 0 or not is_unmodified:
        key = cache_key(
            config,
            device.type,
            backbone=config.backbone.model_dump(),
            initial_weights=fingerprint(model),
            data=task.source.fingerprint,
            image_size=config.data.image_size,
            **augmentation_key(config, task.source.train),
            source=config.source.model_dump(),
        )
        folder = cache_folder(config) / "sources" / key[:16]
        # A folder that exists is complete, so it is read without a lock. This also works if the cache is a read-only
        # folder of another user, where no lock file can be created.
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            # The operating system releases this lock even if the process is killed.
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not folder.exists():
                    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
                    if config.source.epochs > 0:
                        _train(model, config, task, device, checkpoint)
                    with atomic_write(folder) as unfinished:
                        save_backbone(model, unfinished)
                    remove(checkpoint)
        model = load_backbone(str(folder))
    set_run_preprocessing(config, model, task)
    return model.to(device).to(memory_format=torch.channels_last)


def check_source(config: RunConfig, task: Task) -> int:
    """Return the number of optimizer steps that train the source model. If `source.epochs` is 0, return 0.

    Raises:
        ValueError: If `source.epochs` is not 0, and training has fewer than two steps.
    """
    settings, images = config.source, len(task.source.train)
    steps = settings.epochs * (images // settings.batch_size)
    if settings.epochs > 0 and steps < 2:
        raise ValueError(
            f"source.batch_size: expected at least 2 optimizer steps, found {steps} ({images} training images of the "
            f"source, batches of {settings.batch_size}, epochs: {settings.epochs}): lower source.batch_size, or add "
            "images"
        )
    return steps


def _train(model: nn.Module, config: RunConfig, task: Task, device: torch.device, checkpoint: Path) -> None:
    """Train `model` in place, starting from the file `checkpoint` if this file exists.

    Raises:
        ValueError: If the images do not fill one batch, or training has fewer than two steps. If the loss at the end of
            an epoch is not finite. In the last case, the checkpoint is deleted.
        SystemExit: If this is the only process and it receives SIGTERM. A checkpoint is written first.
    """
    settings, total_steps = config.source, check_source(config, task)
    batches = training_batches(config, model, task.source.train, batch_size=settings.batch_size)
    model.to(device).to(memory_format=torch.channels_last).train()
    momentum, groups = settings.momentum, decay_groups(model, settings.weight_decay)
    optimizer = SGD(groups, lr=settings.learning_rate, momentum=momentum, nesterov=momentum > 0)
    # OneCycleLR divides by the number of warm-up steps minus one. With pct_start=0.2, a schedule of five steps would
    # have exactly one warm-up step, and OneCycleLR would divide by zero.
    pct_start = 0.4 if total_steps == 5 else 0.2
    schedule = OneCycleLR(optimizer, settings.learning_rate, total_steps, pct_start=pct_start, cycle_momentum=False)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    step = _load_checkpoint(checkpoint, parts, device)
    is_alone = PartialState().num_processes == 1
    with (
        termination_deferred(is_alone=is_alone) as is_terminated,
        tqdm(total=total_steps, initial=step, desc="source model", unit="step") as bar,
    ):
        while step < total_steps:
            epoch, done = divmod(step, len(batches))
            set_epoch(batches, epoch)
            for batch in skip_first_batches(batches, done):
                loss = F.cross_entropy(model(batch["pixel_values"].to(device)), batch["labels"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                is_due = step % config.training.checkpoint_every_steps == 0 and step < total_steps
                if is_due or is_terminated():
                    _save_checkpoint(checkpoint, parts, step, device)
                if is_terminated():
                    logger.warning(
                        f"\nterminated: step {step} of {total_steps} of the source model is saved; the same command "
                        "resumes there"
                    )
                    sys.exit(128 + signal.SIGTERM)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if not math.isfinite(loss.item()):
                remove(checkpoint)
                raise ValueError(
                    f"the source model diverged in epoch {epoch + 1} (loss {loss.item()}): lower source.learning_rate, "
                    f"which is {settings.learning_rate}"
                )


def _save_checkpoint(file: Path, parts: Mapping[str, Any], step: int, device: torch.device) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    with atomic_write(file) as unfinished:
        torch.save({**state, "step": step, "random": torch.get_rng_state(), "cuda_random": cuda}, unfinished)


def _load_checkpoint(file: Path, parts: Mapping[str, Any], device: torch.device) -> int:
    """Load the state dict of each part from `file`, and return the number of finished steps.

    `parts` contains the model, the optimizer and the learning rate schedule. If the file does not exist or cannot be
    read, load nothing and return 0.
    """
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        logger.warning("%s is damaged, so the source model is trained from the start: %s", file, error)
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_random"], device)
    return state["step"]
