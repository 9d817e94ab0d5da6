"""Starts a run: devices, precision, threads and trackers.

Pushes the result of a run to the Hub.

A whole run, stage by stage: from a configuration to an update and a record.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration

from peft_edge.config import RunConfig, flatten
from peft_edge.data import load_task
from peft_edge.hub import push_update
from peft_edge.records import Record
from peft_edge.training.adaptation import check_adaptation, load_update, merged_copy, sweep
from peft_edge.training.evaluation import check_saved, first_images, kernel_changes, predict_tests
from peft_edge.training.run_folder import RunFolder, lock_output_dir, open_run
from peft_edge.training.source import source_model
from peft_edge.training.summary import build_record, failure_recorded


def start(config: RunConfig) -> Accelerator:
    """Builds the run's `Accelerator`.

    Raises:
        ValueError: A tracker is not installed, the processes do not know of each other, or the batches cannot be
            divided among them.
    """
    if missing := set(config.trackers) - {tracker.value for tracker in get_available_trackers()}:
        names = " ".join(sorted(missing))
        raise ValueError(f"trackers: {names} is not installed: pip install {names}, or leave it out")
    torch.set_num_threads(config.num_threads)
    # Resuming gives the same bits only if every operation does.
    torch.backends.cudnn.deterministic = True
    accelerator = Accelerator(
        # Said outright where there is nothing else: several processes find each other only then.
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=config.training.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / "logs")),
        # Batch sizes are those of all processes together, so that a run means the same on any number of them.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.training.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    _check_processes(accelerator)
    _check_divisible(config, accelerator.num_processes)
    return accelerator


def start_trackers(config: RunConfig, accelerator: Accelerator) -> None:
    """Opens the trackers, and sends them the configuration."""
    accelerator.init_trackers("peft-edge", config={key: _scalar(value) for key, value in _flat(config).items()})


def _flat(config: RunConfig) -> dict[str, Any]:
    return flatten(config.model_dump())


def _scalar(value: Any) -> Any:
    """Trackers take no lists."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _check_processes(accelerator: Accelerator) -> None:
    """Accelerate runs fewer processes than were asked for in two cases, and says so in neither."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        # Each would take itself for the only one, and write to the same folder.
        raise ValueError(f"{asked} processes were started and Accelerate sees {accelerator.num_processes}: add --cpu")
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "`accelerate launch --cpu` starts one process whatever --num_processes says. For several on the CPU: "
            "accelerate launch --multi_gpu --num_processes 2 train.py --cpu",
            stacklevel=3,
        )


def _check_divisible(config: RunConfig, num_processes: int) -> None:
    training = config.training
    parts = num_processes * training.gradient_accumulation_steps
    if training.batch_size % parts:
        raise ValueError(
            f"training.batch_size: {training.batch_size} images cannot be divided among {num_processes} processes and "
            f"{training.gradient_accumulation_steps} accumulation steps: choose a multiple of {parts}"
        )
    if training.eval_batch_size % num_processes:
        raise ValueError(
            f"training.eval_batch_size: {training.eval_batch_size} images cannot be divided among {num_processes} "
            "processes: choose a multiple of them"
        )


def push_run(config: RunConfig, run: RunFolder) -> None:
    """Pushes the update of a run that has succeeded, where `hub.repo_id` says so.

    A push that fails leaves the run as it is, a success that lies complete on the disk: what went wrong is printed, and
    the same command pushes again.

    Args:
        config: Of the run; its section `hub` is used.
        run: The run's folder.
    """
    hub = config.hub
    if hub.repo_id is None or not run.accelerator.is_main_process:
        return
    update = next(path for path in (run.path / "adapter", run.path / "model") if path.exists())
    try:
        address = push_update(
            update,
            hub.repo_id,
            record=run.path / "record.json",
            license=hub.license,
            private=hub.private,
            revision=hub.revision,
        )
    except (OSError, ValueError) as error:
        run.accelerator.print(
            f"error: {error}\nThe run has succeeded. The same command trains nothing, and pushes again"
        )
    else:
        run.accelerator.print(f"pushed: {address}")


def run(config: RunConfig) -> Record:
    """Makes or finds the source model, adapts it, and tests what was saved.

    `config.output_dir` then holds the update and the record, and with `hub.repo_id` the Hub does too. A run that was
    interrupted goes on from its last checkpoint, and one that is finished is only read.

    Args:
        config: From `load_config`.

    Raises:
        ValueError: The configuration does not fit the data or the network; the message says what to change.
        DivergedError: Training diverged at every learning rate.
        OSError: A file cannot be read or written.
    """
    accelerator = start(config)
    with lock_output_dir(config, accelerator):
        return _run(config, accelerator)


def _run(config: RunConfig, accelerator: Accelerator) -> Record:
    started, clock = time.time(), time.perf_counter()
    folder = open_run(config, accelerator)
    if (finished := folder.record) is not None:
        accelerator.print(f"{folder.path} holds this run, finished:")
        push_run(config, folder)
        return finished

    with failure_recorded(config, folder, started):
        # Data: a source, what the model must learn, and what changed between them.
        task = load_task(**config.data.model_dump(), seed=config.seed)
        check_adaptation(config, task)

        # The source model: trained once, then shared by every run that asks for the same one.
        source = source_model(config, task, accelerator.device)
        predictions = [predict_tests(source, config, task, accelerator)]

        # Adaptation: every learning rate gets the same budget, and the target's validation split chooses.
        start_trackers(config, accelerator)
        chosen, tried, checks, changes, update = [], [], {}, {}, None
        for number, target in enumerate(task.targets if config.method != "none" else (), start=1):
            increment = number if len(task.targets) > 1 else None
            candidates, entries = sweep(
                config, target, source, accelerator, folder.path, increment=increment, previous=update
            )
            best = max(candidates, key=lambda candidate: candidate.validation_accuracy)
            chosen.append(best)
            tried += entries

            # What users get is what was saved, so that is what is tested.
            update = best.update
            reloaded = load_update(update, accelerator.device)
            merged = merged_copy(reloaded)
            checks = check_saved(reloaded, merged, first_images(config, source, target), best.logits)
            changes = {} if merged is None else kernel_changes(source, merged)
            predictions.append(predict_tests(reloaded, config, task, accelerator))

        record = build_record(
            config,
            task,
            source,
            started=started,
            # The time of the day may jump.
            total_time=None if folder.is_resumed else time.perf_counter() - clock,
            predictions=predictions,
            chosen=chosen,
            tried=tried,
            update=folder.publish(update) if update is not None else None,
            checks=checks,
            changes=changes,
        )
        folder.write_record(record)
    push_run(config, folder)
    accelerator.end_training()
    return record
