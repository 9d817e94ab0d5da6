"""The training loop: train, evaluate, write checkpoints, and resume from the newest checkpoint."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FrameType

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState

from peft_edge.profiling.callback import ProfilingCallback
from peft_edge.records import StepProfile
from peft_edge.training.evaluation import predict
from peft_edge.training.run_folder import ActiveRun, Progress, last_good_checkpoint, load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)

DIVERGED_LOSS = 100.0
"""A mean cross-entropy above this value means divergence. Guessing uniformly among a million classes gives 14."""


class DivergedError(ValueError):
    """Raised if a loss is above `DIVERGED_LOSS`, or if a loss or a validation logit is not finite."""

    tried: Sequence[dict[str, object]] = ()  # the function `sweep` sets this: one dict for each tried learning rate


def train(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batches: DataLoaderShard,
    validation: DataLoaderShard,
    *,
    evaluated: nn.Module,
    run: ActiveRun,
    name: str,
) -> tuple[Progress, list[StepProfile]]:
    """Train until `training.epochs` are done, starting from the newest checkpoint if there is one.

    An interrupted and resumed run gives the same weights, bit for bit, as an uninterrupted run. The accelerator of
    `run` must have prepared the first five arguments. `evaluated` is the model to evaluate, and normally the same
    object as `model`. With latent replay, `model` is only the part that is trained on stored features (`Replay.tail`),
    and `evaluated` is the whole model. `name` identifies this training run in folders, trackers and the progress bar.

    Returns:
        The `Progress`, which contains the measurements of each epoch, and the step profiles of all processes. The list
        of profiles is empty if no step was measured, for example because `profiling.every_n_steps` is 0.

    Raises:
        OSError: If a checkpoint or a step profile cannot be written.
        ValueError: If the newest checkpoint is damaged, or was written by a different number of processes.
        DivergedError: If a loss is above `DIVERGED_LOSS`, or a loss or a validation logit is not finite. Checkpoints
            whose weights may have diverged are deleted; earlier checkpoints are kept.
        SystemExit: If the run has a single process and this process receives SIGTERM. The process first finishes the
            current step and writes a checkpoint. With several processes, the previous SIGTERM handler stays active.
    """
    settings, accelerator, checkpoints = run.config.training, run.accelerator, run.path / "checkpoints" / name
    progress = load_checkpoint(accelerator, checkpoints)
    total_steps, is_quiet = settings.epochs * len(batches), not accelerator.is_main_process

    def log(values: Mapping[str, float]) -> None:
        accelerator.log({f"{name}/{key}": value for key, value in values.items()}, step=progress.step)

    def diverged(loss: float, bad_step: int) -> DivergedError:
        good = last_good_checkpoint(accelerator, checkpoints, bad_step)
        kept = f"The last good checkpoint is {good}" if good else "No checkpoint is known to be good"
        return DivergedError(
            f"{name} diverged: the loss at step {progress.step} is {loss:.3g}. Lower training.learning_rate, raise "
            f"training.warmup_steps, or set training.max_grad_norm. {kept}"
        )

    options = run.config.profiling.model_dump()
    profiling = ProfilingCallback(**options, output_dir=run.path, name=name, log=log, show_table=False)
    # `send` calls the callback in the same way as `transformers.Trainer` does.
    state, control = TrainerState(global_step=progress.step), TrainerControl()
    unwrapped = accelerator.unwrap_model(model)

    def send(event: str) -> None:
        getattr(profiling, event)(None, state, control, model=unwrapped, optimizer=optimizer)

    with (
        closing(profiling),
        termination_deferred(is_alone=accelerator.num_processes == 1) as is_terminated,
        tqdm(desc=f"adapting, {name}", total=total_steps, initial=progress.step, unit="step", disable=is_quiet) as bar,
    ):
        send("on_train_begin")
        while progress.step < total_steps:
            epoch, done = divmod(progress.step, len(batches))
            model.train()
            batches.set_epoch(epoch)
            waiting_since = time.perf_counter()
            for batch in skip_first_batches(batches, done):
                progress.loading_time += time.perf_counter() - waiting_since
                send("on_step_begin")
                started = time.perf_counter()
                loss = _step(model, optimizer, schedule, batch, accelerator, settings.max_grad_norm, send)
                seconds = time.perf_counter() - started
                if profiling.is_measuring and progress.step:
                    # Measuring slows this step down, so add the mean time of the earlier steps instead.
                    seconds = progress.train_time / progress.step
                progress.step = state.global_step = progress.step + 1
                send("on_step_end")
                # `item` waits until the device has finished the step, so this waiting time is added to the time of the
                # step. The time in which `on_step_end` writes a step profile is not added.
                started = time.perf_counter()
                mean_loss = accelerator.reduce(loss, reduction="mean").item()
                progress.train_time += seconds + time.perf_counter() - started
                # Unlike `>`, `not <=` is also true for NaN.
                if not mean_loss <= DIVERGED_LOSS:
                    raise diverged(mean_loss, progress.step - 1)
                progress.loss_sum += mean_loss
                bar.update()

                if progress.step % len(batches) == 0:
                    accuracy = None
                    if (epoch + 1) % settings.eval_every_epochs == 0 or progress.step == total_steps:
                        started = time.perf_counter()
                        found = predict(evaluated, validation, accelerator, stage="validating")
                        progress.validation_time += time.perf_counter() - started
                        if -1 in found.predictions:
                            raise diverged(float("nan"), progress.step)
                        accuracy = found.accuracy
                    values = {"train loss": progress.loss_sum / len(batches), "valid accuracy": accuracy}
                    progress.metrics.append({"step": progress.step, **values, "train time": progress.train_time})
                    progress.loss_sum = 0.0
                    known = {key: value for key, value in values.items() if value is not None}
                    bar.set_postfix(known)
                    log({**known, "learning rate": schedule.get_last_lr()[0]})

                is_due = progress.step % settings.checkpoint_every_steps == 0 and progress.step < total_steps
                ends_here = is_terminated()
                if is_due or ends_here:
                    save_checkpoint(accelerator, checkpoints, progress, keep=settings.keep_checkpoints)
                if ends_here:
                    logger.warning(
                        f"\nterminated: step {progress.step} of {total_steps} is saved; the same command resumes there"
                    )
                    sys.exit(128 + signal.SIGTERM)
                waiting_since = time.perf_counter()
        send("on_train_end")
    return progress, profiling.rows


def _step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: AcceleratedScheduler,
    batch: dict[str, Tensor],
    accelerator: Accelerator,
    max_grad_norm: float | None,
    send: Callable[[str], None],
) -> Tensor:
    """Take one optimizer step on `batch`, and return the mean loss over this process's images, as a scalar tensor."""
    parts = accelerator.gradient_accumulation_steps
    batch_loss = torch.zeros((), device=accelerator.device)
    for images, labels in zip(batch["pixel_values"].chunk(parts), batch["labels"].chunk(parts), strict=True):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if max_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            send("on_pre_optimizer_step" if accelerator.sync_gradients else "on_substep_end")
            optimizer.step()
            if accelerator.sync_gradients:
                send("on_optimizer_step")
            schedule.step()
            optimizer.zero_grad()
        batch_loss += loss.detach() / parts
    return batch_loss


@contextmanager
def on_termination(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Set `handler` as the handler of SIGTERM inside the `with` block. If called outside the main thread, do nothing.

    Python allows only the main thread to set signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def termination_deferred(*, is_alone: bool) -> Iterator[Callable[[], bool]]:
    """Catch the first SIGTERM inside the `with` block. Yield a function that returns whether this signal has arrived.

    The caller can thus finish the current step, write a checkpoint, and then exit. A second SIGTERM calls the handler
    that was set before the block. `is_alone` says whether the run has a single process. If `is_alone` is False, SIGTERM
    calls the previous handler at once, and the yielded function always returns False. In a run with several processes,
    a launcher may send SIGTERM because a process has died, and without this process no checkpoint can be written.
    """
    if not is_alone:
        yield lambda: False
        return
    received: list[int] = []
    previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGTERM, previous)

    with on_termination(remember):
        yield lambda: bool(received)
