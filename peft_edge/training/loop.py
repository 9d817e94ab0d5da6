"""The Accelerate loop: train, evaluate each epoch, keep checkpoints, go on from the last one."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from peft_edge.config import TrainingConfig
from peft_edge.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from peft_edge.training.evaluation import accuracy


def train(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batches: DataLoaderShard,
    validation: DataLoaderShard,
    *,
    settings: TrainingConfig,
    accelerator: Accelerator,
    checkpoints: Path,
    name: str,
) -> Progress:
    """Trains for `settings.epochs`, from the newest checkpoint if there is one, to the same bits as without the stop.

    Args:
        model: Prepared by the accelerator, as are the four that follow.
        optimizer: Of the trainable parameters.
        schedule: Stepped once per optimizer step, whatever the number of processes.
        batches: Each is worked off in one optimizer step.
        validation: Evaluated after each epoch.
        settings: Epochs, clipping and checkpoints.
        accelerator: The run's.
        checkpoints: Folder of this training's checkpoints.
        name: What trackers and the progress bar call this training.

    Returns:
        The steps done, their seconds, and the figures of each epoch.

    Raises:
        OSError: A checkpoint cannot be written.
        ValueError: A checkpoint does not belong to this training.
    """
    progress = load_checkpoint(accelerator, checkpoints)
    total_steps = settings.epochs * len(batches)
    with tqdm(
        desc=f"adapting, {name}",
        total=total_steps,
        initial=progress.step,
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress.step < total_steps:
            epoch, done = divmod(progress.step, len(batches))
            model.train()
            batches.set_epoch(epoch)
            for batch in skip_first_batches(batches, done):
                started = time.perf_counter()
                progress.loss_sum += _step(model, optimizer, schedule, batch, accelerator, settings.max_grad_norm)
                progress.train_time += time.perf_counter() - started
                progress.step += 1
                bar.update()
                if progress.step % len(batches) == 0:
                    figures = _end_epoch(progress, len(batches), accuracy(model, validation, accelerator))
                    bar.set_postfix(figures)
                    figures["learning rate"] = schedule.get_last_lr()[0]
                    accelerator.log({f"{name}/{key}": value for key, value in figures.items()}, step=progress.step)
                if progress.step % settings.checkpoint_every_steps == 0 and progress.step < total_steps:
                    save_checkpoint(accelerator, checkpoints, progress, keep=settings.keep_checkpoints)
    return progress


def _step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batch: dict[str, Tensor],
    accelerator: Accelerator,
    max_grad_norm: float | None,
) -> float:
    """One optimizer step; returns the mean loss of the batch over all processes."""
    parts = accelerator.gradient_accumulation_steps
    batch_loss = torch.zeros((), device=accelerator.device)
    for images, labels in zip(batch["pixel_values"].chunk(parts), batch["labels"].chunk(parts), strict=True):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        batch_loss += loss.detach() / parts
    return accelerator.reduce(batch_loss, reduction="mean").item()


def _end_epoch(progress: Progress, steps: int, valid_accuracy: float) -> dict[str, float]:
    figures = {"train loss": progress.loss_sum / steps, "valid accuracy": valid_accuracy}
    progress.metrics.append({"step": progress.step, **figures, "train time": progress.train_time})
    progress.loss_sum = 0.0
    return figures
