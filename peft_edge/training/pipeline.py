"""Run all stages of a configuration: data, source model, adaptation, tests, record, upload."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration

from peft_edge.config import RunConfig, flatten
from peft_edge.config.schema import missing_files
from peft_edge.data import Task, load_configured_task
from peft_edge.data.loader import typical_size
from peft_edge.hub import push_update
from peft_edge.records import Record
from peft_edge.training.adaptation import check_adaptation, load_update, merged_copy, sweep
from peft_edge.training.batches import augmentation_of
from peft_edge.training.evaluation import check_saved, first_images, kernel_changes, predict_source_tests, predict_tests
from peft_edge.training.run_folder import ActiveRun, end_together, find_run, lock_output_dir, open_run
from peft_edge.training.source import check_source, new_backbone, source_model
from peft_edge.training.summary import build_record, failure_recorded, retention_warning

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Record:
    """Train or load the source model, adapt it to each target in turn, and test the saved adapter.

    Methods such as full fine-tuning save the whole model instead of an adapter. After the run, `config.output_dir`
    contains the adapter or model, and `record.json` with the results. With `method="none"`, there is no adapter and no
    model, only `record.json`. If `hub.repo_id` is set, the files are also uploaded to the Hub. An interrupted run
    continues from its newest checkpoint. If the run is already finished, nothing is trained. The function then returns
    the existing record, and uploads the files again if `hub.repo_id` is set.

    Raises:
        ValueError: If the configuration does not fit the data or the network. The message says what to change.
        DivergedError: If training on a target diverges at every learning rate.
        RuntimeError: If the logits of the saved or merged model differ from those of the trained model by more than a
            tolerance.
        OSError: If a file cannot be read or written, or the upload fails after the run has succeeded.
    """
    accelerator = start_accelerator(config)
    started, clock = time.time(), time.perf_counter()
    with torch_settings(config.num_threads), end_together(config, accelerator):
        # Check the configuration and the data before the first file is written, so that mistakes leave no files behind.
        record = find_run(config, accelerator).record
        task = _checked_task(config, accelerator) if record is None else None
        with lock_output_dir(config, accelerator):
            opened = open_run(config, accelerator)
            if task is not None:  # if another command has just finished this run, `opened.record` is its record
                record = opened.record or _run_stages(opened, task, started=started, clock=clock)
            else:
                accelerator.print(f"{opened.path} holds this run, finished:")
            assert record is not None
            if accelerator.is_main_process and config.hub.repo_id is not None:
                _push(opened, record, config.hub.repo_id)
    accelerator.end_training()
    return record


@contextmanager
def torch_settings(num_threads: int) -> Iterator[None]:
    """Set torch's number of CPU threads and make cuDNN deterministic in a `with` block, then restore both settings."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(num_threads)
    # A resumed run equals an uninterrupted run bit for bit only if every operation is deterministic.
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


def _checked_task(config: RunConfig, accelerator: Accelerator) -> Task:
    """Load the source and target images, print a summary, and check everything that can be checked before training.

    Raises:
        ValueError: If a file does not exist, or the configuration does not fit the data or the network.
        OSError: If a file cannot be read.
    """
    # Without network, a request to the Hub takes half a minute. Therefore check files before the first request.
    if problems := [f"{key}: {problem}" for key, problem in missing_files(config)]:
        raise ValueError("\n".join(problems))
    for key, name in (("data.name", config.data.name), ("data.shift", config.data.shift)):
        if name is not None and "/" in name and not Path(name).expanduser().is_dir():
            accelerator.print(f"{key}: there is no folder {name!r}, so the dataset {name!r} of the Hub is read")
    # Load the backbone first, so that errors in its weights are raised before any data are read.
    new_backbone(config, num_classes=2)
    task = load_configured_task(config.data.model_dump(), seed=config.seed)
    check_source(config, task)
    check_adaptation(config, task)
    for name, domain in {"source": task.source, "target": task.targets[0]}.items():
        sizes = ", ".join(f"{len(split):,} {key}" for key, split in vars(domain).items())
        augment = augmentation_of(config, domain.train)
        size = "{} x {} pixels".format(*typical_size(domain.train))
        accelerator.print(f"{name} images: {sizes}; {domain.num_classes} classes; about {size}; augmentation {augment}")
    return task


def _run_stages(run: ActiveRun, task: Task, *, started: float, clock: float) -> Record:
    """Run all stages after the checks: source model, adaptation, tests and record. Return the record.

    `started` is the result of `time.time()` at the start of the run, and `clock` is the result of `time.perf_counter()`
    at the start of the run.
    """
    config, accelerator = run.config, run.accelerator
    with failure_recorded(run, started):
        # The source model is trained once, and all runs with the same source configuration share it.
        source = source_model(config, task, accelerator.device, say=accelerator.print)
        predictions = [predict_source_tests(source, config, task, accelerator)]

        # Adapt to one target after another. For each target, `sweep` trains one candidate for each learning rate. Keep
        # the candidate with the best validation accuracy.
        start_trackers(config, accelerator)
        chosen, tried, checks, changes, update = [], [], {}, {}, None
        for number, target in enumerate(task.targets if config.method != "none" else (), start=1):
            increment = number if len(task.targets) > 1 else None
            candidates, entries = sweep(run, target, source, increment=increment, previous=update)
            best = max(candidates, key=lambda candidate: candidate.validation_accuracy)
            chosen.append(best)
            tried += entries

            # Test the reloaded model instead of the trained one, because users will load the same files.
            update = best.update
            reloaded = load_update(update, accelerator.device)
            merged = merged_copy(reloaded)
            checks = check_saved(reloaded, merged, first_images(config, source, target), best.logits)
            changes = {} if merged is None else kernel_changes(source, merged)
            predictions.append(predict_tests(reloaded, config, task, accelerator))

        record = build_record(
            run,
            task,
            source,
            started=started,
            total_time=None if run.is_resumed else time.perf_counter() - clock,
            predictions=predictions,
            chosen=chosen,
            tried=tried,
            update=run.publish(update) if update is not None else None,
            checks=checks,
            changes=changes,
        )
        run.write_record(record)
    if accelerator.is_main_process and (warning := retention_warning(record)):
        logger.warning(warning)
    return record


def train_source(config: RunConfig) -> None:
    """Train the source model of a run and write it to the cache. If the cache contains the model, only load it.

    Raises:
        ValueError: If the source model cannot be trained with this configuration.
        OSError: If a file cannot be read or written.
    """
    accelerator = start_accelerator(config)
    task = load_configured_task(config.data.model_dump(), seed=config.seed)
    source_model(config, task, accelerator.device)
    accelerator.end_training()


def start_accelerator(config: RunConfig) -> Accelerator:
    """Create the run's `Accelerator`.

    Raises:
        ValueError: If a tracker is not installed. If Accelerate sees fewer processes than were started. If
            `training.batch_size` is not a multiple of the number of processes times the number of accumulation steps.
            If `training.eval_batch_size` is not a multiple of the number of processes.
    """
    if missing := set(config.trackers) - {tracker.value for tracker in get_available_trackers()}:
        names = " ".join(sorted(missing))
        raise ValueError(f"trackers: {names} is not installed: pip install {names}, or leave it out")
    training, num_steps = config.training, config.training.gradient_accumulation_steps
    accelerator = Accelerator(
        # Without a GPU, Accelerate connects several processes only if the CPU is requested explicitly.
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=training.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / "logs")),
        # Batch sizes count the images of all processes, so a run does not depend on the number of processes.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False),
    )

    # In the two cases below, Accelerate silently uses fewer processes than the user requested.
    num_processes, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        # Without this error, each process would do the whole run alone, and all would write to the same folder.
        raise ValueError(
            f"{started} processes were started and Accelerate sees {num_processes}: add --cpu, which "
            "connects processes that have no GPU each"
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "`accelerate launch --cpu` ignores --num_processes and starts one process. For several processes on the "
            "CPU: accelerate launch --multi_gpu --num_processes 2 train.py --cpu",
            stacklevel=2,
        )
    parts = num_processes * num_steps
    if training.batch_size % parts:
        raise ValueError(
            f"training.batch_size: {training.batch_size} images cannot be divided among {num_processes} processes and "
            f"{num_steps} accumulation steps: choose a multiple of {parts}"
        )
    if training.eval_batch_size % num_processes:
        raise ValueError(
            f"training.eval_batch_size: {training.eval_batch_size} images cannot be divided among {num_processes} "
            f"processes: choose a multiple of {num_processes}"
        )
    return accelerator


def start_trackers(config: RunConfig, accelerator: Accelerator) -> None:
    """Start the trackers of `config.trackers`, and send the configuration to each tracker."""
    values = flatten(config.model_dump()).items()
    # Trackers accept only numbers, strings and booleans.
    scalars = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values}
    accelerator.init_trackers("peft-edge", config=scalars)


def _push(run: ActiveRun, record: Record, repo_id: str) -> None:
    """Upload the adapter or model of a finished run to the Hub.

    If the upload fails, add the reason to `record.json`, and raise an OSError.
    """
    options = run.config.hub.model_dump(exclude={"repo_id"})
    update = next(path for path in (run.path / "adapter", run.path / "model") if path.exists())
    if record.run_info.error_msg:
        # `error_msg` says why an earlier upload failed. The record on the Hub should not contain this message.
        record.run_info.error_msg = ""
        run.write_record(record)
    try:
        address = push_update(update, repo_id, record=run.path / "record.json", **options)
    except (OSError, ValueError) as error:
        record.run_info.error_msg = f"the push to {repo_id} failed: {error}"
        run.write_record(record)
        message = f"{error}\nThe run has succeeded. The same command pushes again, without training"
        raise OSError(message) from error
    run.accelerator.print(f"pushed: {address}")
