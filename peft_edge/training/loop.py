"""What a training does when the system asks its process to end.

The Accelerate loop: train, evaluate each epoch, keep checkpoints, go on from the last one.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState

from peft_edge.config import RunConfig
from peft_edge.profiling.callback import ProfilingCallback
from peft_edge.records import StepProfile
from peft_edge.training.evaluation import predict
from peft_edge.training.run_folder import Progress, last_good_checkpoint, load_checkpoint, save_checkpoint


@contextmanager
def termination_deferred(*, is_alone: bool) -> Iterator[Callable[[], bool]]:
    """Lets a process go on when it is terminated (SIGTERM), so that it can save what it has; the second time it ends.

    Args:
        is_alone: Whether it is the run's only process. One of several would wait for others, which may be why it is
            terminated, and so ends at once.

    Yields:
        Whether it has been asked to end.
    """
    if not is_alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may say what a signal does
        return
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, previous)

    previous = signal.signal(signal.SIGTERM, remember) or signal.SIG_DFL
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, previous)


DIVERGED_LOSS = 100.0
"""The right class then has a probability of e^-100 in the mean; guessing among a million classes gives a loss of 14."""


class DivergedError(ValueError):
    """A training whose loss has left every reasonable range."""

    tried: Sequence[dict[str, Any]] = ()
    """What was tried until then, for the record."""


def train(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batches: DataLoaderShard,
    validation: DataLoaderShard,
    *,
    evaluated: nn.Module,
    config: RunConfig,
    accelerator: Accelerator,
    run: Path,
    name: str,
) -> tuple[Progress, list[StepProfile]]:
    """Trains for `training.epochs`, from the newest checkpoint if there is one, to the same bits as without the stop.

    Args:
        model: Prepared by the accelerator, as are the four that follow.
        optimizer: Of the trainable parameters.
        schedule: Stepped once per optimizer step, whatever the number of processes.
        batches: Each is worked off in one optimizer step.
        validation: Asked after every `training.eval_every_epochs` epochs, and after the last.
        evaluated: What answers then: `model`, or the whole model of which `model` is a part.
        config: Epochs, clipping, checkpoints and profiling are taken from it.
        accelerator: The run's.
        run: The run's folder.
        name: What this training is called in it, and by trackers and the progress bar.

    Returns:
        The steps done, their seconds and the figures of each epoch; and what a step costs each process.

    Raises:
        OSError: A checkpoint cannot be written.
        ValueError: A checkpoint does not belong to this training.
        SystemExit: The process was asked to end (SIGTERM), and a checkpoint of its last step is saved.
        DivergedError: The loss or a logit is not finite, or the loss is above `DIVERGED_LOSS`. Of the checkpoints, the
            good ones are kept.
    """
    settings, checkpoints = config.training, run / "checkpoints" / name
    progress = load_checkpoint(accelerator, checkpoints)
    total_steps = settings.epochs * len(batches)

    def log(figures: Mapping[str, float]) -> None:
        accelerator.log({f"{name}/{key}": value for key, value in figures.items()}, step=progress.step)

    # The events are those of which transformers' Trainer would tell.
    profiling = ProfilingCallback(
        config.profiling.every_n_steps,
        output_dir=run,
        name=name,
        log=log,
        trace=config.profiling.trace,
        show_table=False,
    )
    state, control = TrainerState(global_step=progress.step), TrainerControl()
    unwrapped = accelerator.unwrap_model(model)

    def tell(event: str) -> None:
        getattr(profiling, event)(None, state, control, model=unwrapped, optimizer=optimizer)

    with (
        closing(profiling),
        termination_deferred(is_alone=accelerator.num_processes == 1) as is_asked_to_end,
        tqdm(
            desc=f"adapting, {name}",
            total=total_steps,
            initial=progress.step,
            unit="step",
            disable=not accelerator.is_main_process,
        ) as bar,
    ):
        tell("on_train_begin")
        while progress.step < total_steps:
            epoch, done = divmod(progress.step, len(batches))
            model.train()
            batches.set_epoch(epoch)
            for batch in skip_first_batches(batches, done):
                tell("on_step_begin")
                started = time.perf_counter()
                loss = _step(model, optimizer, schedule, batch, accelerator, settings.max_grad_norm, tell)
                seconds = time.perf_counter() - started
                if profiling.is_measuring and progress.step:
                    seconds = progress.train_time / progress.step  # the mean of the others, since this one took longer
                progress.step = state.global_step = progress.step + 1
                tell("on_step_end")
                # Reading the loss waits for the device, so it belongs to the step; what profiling writes does not.
                started = time.perf_counter()
                mean_loss = accelerator.reduce(loss, reduction="mean").item()
                progress.train_time += seconds + time.perf_counter() - started
                # Written so that a NaN fails too.
                if not mean_loss <= DIVERGED_LOSS:
                    good = last_good_checkpoint(accelerator, checkpoints, progress.step - 1)
                    raise DivergedError(_diverged(name, progress.step, mean_loss, good))
                progress.loss_sum += mean_loss
                bar.update()
                if progress.step % len(batches) == 0:
                    is_evaluated = (epoch + 1) % settings.eval_every_epochs == 0 or progress.step == total_steps
                    found = predict(evaluated, validation, accelerator) if is_evaluated else None
                    if found is not None and -1 in found.predictions:
                        good = last_good_checkpoint(accelerator, checkpoints, progress.step)
                        raise DivergedError(_diverged(name, progress.step, float("nan"), good))
                    figures = _end_epoch(progress, len(batches), found.accuracy if found is not None else None)
                    bar.set_postfix(figures)
                    log({**figures, "learning rate": schedule.get_last_lr()[0]})
                is_due = progress.step % settings.checkpoint_every_steps == 0 and progress.step < total_steps
                ends_here = is_asked_to_end()
                if is_due or ends_here:
                    save_checkpoint(accelerator, checkpoints, progress, keep=settings.keep_checkpoints)
                if ends_here:
                    print(
                        f"\nterminated: step {progress.step} of {total_steps} is saved, to go on from", file=sys.stderr
                    )
                    sys.exit(128 + signal.SIGTERM)
        tell("on_train_end")
    return progress, profiling.rows


def _step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batch: dict[str, Tensor],
    accelerator: Accelerator,
    max_grad_norm: float | None,
    tell: Callable[[str], None],
) -> Tensor:
    """One optimizer step; returns the mean loss of this process's part of the batch."""
    parts = accelerator.gradient_accumulation_steps
    batch_loss = torch.zeros((), device=accelerator.device)
    for images, labels in zip(batch["pixel_values"].chunk(parts), batch["labels"].chunk(parts), strict=True):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            tell("on_pre_optimizer_step" if accelerator.sync_gradients else "on_substep_end")
            optimizer.step()
            if accelerator.sync_gradients:
                tell("on_optimizer_step")
            schedule.step()
            optimizer.zero_grad()
        batch_loss += loss.detach() / parts
    return batch_loss


def _diverged(name: str, step: int, loss: float, good: Path | None) -> str:
    kept = f"The last good checkpoint is {good}" if good else "There is no checkpoint that is known to be good"
    return (
        f"{name} diverged: the loss at step {step} is {loss:.3g}. Lower training.learning_rate, raise "
        f"training.warmup_steps, or set training.max_grad_norm. {kept}"
    )


def _end_epoch(progress: Progress, steps: int, valid_accuracy: float | None) -> dict[str, float]:
    """Notes the figures of an epoch, null where nothing was evaluated, and returns those that there are."""
    figures = {"train loss": progress.loss_sum / steps, "valid accuracy": valid_accuracy}
    progress.metrics.append({"step": progress.step, **figures, "train time": progress.train_time})
    progress.loss_sum = 0.0
    return {name: figure for name, figure in figures.items() if figure is not None}
