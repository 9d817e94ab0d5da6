"""Starts a run: devices, precision, threads and trackers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration

from peft_edge.config import RunConfig, flatten


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
