"""The record of a run, and the table that is printed from it."""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.utils import CONFIG_NAME
from torch import nn

from peft_edge.backbones import fingerprint
from peft_edge.config import RunConfig
from peft_edge.data import Task
from peft_edge.profiling.callback import read_profile
from peft_edge.profiling.tables import profile_table, text_table
from peft_edge.records import (
    CANCELED,
    DIVERGED,
    FAILED,
    SUCCESS,
    KernelChange,
    MetaInfo,
    Record,
    RunInfo,
    TrainInfo,
    package_info,
    system_info,
)
from peft_edge.training.adaptation import Candidate
from peft_edge.training.evaluation import SOURCE, SOURCE_BEFORE, TARGET, TARGET_BEFORE, Predictions, results
from peft_edge.training.loop import DivergedError
from peft_edge.training.run_folder import RunFolder

_DIFFERENCE = "_max_logit_difference"


def build_record(
    config: RunConfig,
    task: Task,
    source: nn.Module,
    *,
    started: float,
    total_time: float | None,
    predictions: list[list[Predictions]],
    chosen: list[Candidate],
    tried: list[dict[str, Any]],
    update: Path | None,
    checks: dict[str, float],
    changes: dict[str, KernelChange],
) -> Record:
    """Puts together the record of a run that has succeeded.

    Args:
        config: The run's configuration.
        task: Its task.
        source: The source model.
        started: When the run started, in seconds since 1970.
        total_time: Seconds of the whole run; None for one that was resumed.
        predictions: See `results`.
        chosen: The candidate that was kept for each target; none for a method without an update.
        tried: The learning rates that were tried, from `sweep`.
        update: The folder of the saved adapter or model; None if there is none.
        checks: From `check_saved`.
        changes: From `kernel_changes`.
    """
    steps = sum(best.metrics[-1]["step"] for best in chosen)
    return Record(
        run_info=_run_info(config, started, total_time=total_time, peft_config=_peft_config(update)),
        train_info=TrainInfo(
            status=SUCCESS,
            train_time=sum(best.train_time for best in chosen) if chosen else None,
            file_size=sum(file.stat().st_size for file in update.glob("*.safetensors")) if update else 0,
            num_trainable_params=chosen[-1].num_trainable_params if chosen else 0,
            num_total_params=sum(parameter.numel() for parameter in source.parameters()),
            metrics=[
                *(entry for best in chosen for entry in best.metrics),
                {
                    "step": steps,
                    "train loss": chosen[-1].metrics[-1]["train loss"] if chosen else None,
                    "train samples": steps * config.training.batch_size,
                    **results(predictions),
                },
            ],
            sweep=tried,
            replay=chosen[-1].replay if chosen else None,
            checks=checks,
            changes=changes,
        ),
        meta_info=_meta_info(
            config,
            model_info={"sha": fingerprint(source), "created_at": None},
            dataset_info={task.name: {"sha": task.fingerprint, "created_at": None}},
        ),
        profile=chosen[-1].profile if chosen else [],
    )


@contextmanager
def failure_recorded(config: RunConfig, run: RunFolder, started: float) -> Iterator[None]:
    """Writes the record of a run that stops with an error; started again, the run goes on and replaces it.

    A launcher that finds one process dead terminates the others (SIGTERM), which is an error here like any other.
    """
    previous = _on_termination(lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except BaseException as error:
        # From here on only the record is left to be written.
        _on_termination(signal.SIG_IGN)
        statuses = {KeyboardInterrupt: CANCELED, DivergedError: DIVERGED}
        status = statuses.get(type(error), FAILED)
        message = "".join(traceback.format_exception(error))
        # A full disk may be why the run stops.
        with suppress(OSError):
            record = failed_record(config, message, started=started, status=status)
            record.train_info.sweep = list(getattr(error, "tried", ()))
            record.profile = read_profile(run.path / "profile")
            run.write_record(record)
        raise
    finally:
        _on_termination(previous or signal.SIG_DFL)


def failed_record(config: RunConfig, error_msg: str, *, started: float, status: str = FAILED) -> Record:
    """Returns the record of a run that has not succeeded.

    Args:
        config: The run's configuration.
        error_msg: Why.
        started: When the run started, in seconds since 1970.
        status: What became of it.
    """
    return Record(
        run_info=_run_info(config, started, error_msg=error_msg),
        train_info=TrainInfo(status=status),
        meta_info=_meta_info(config, model_info={}, dataset_info={}),
    )


def _on_termination(handler: Any) -> Any:
    # Only the main thread may say what a signal does.
    return signal.signal(signal.SIGTERM, handler) if threading.current_thread() is threading.main_thread() else None


def _run_info(config: RunConfig, started: float, **known: Any) -> RunInfo:
    return RunInfo(
        created_at=datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        experiment_name=f"{config.method}/{Path(config.output_dir).name}",
        train_config={"model_id": config.backbone.name, **config.model_dump()},
        **known,
    )


def _meta_info(config: RunConfig, *, model_info: dict[str, Any], dataset_info: dict[str, Any]) -> MetaInfo:
    uses_gpu = torch.cuda.is_available() and not config.cpu
    return MetaInfo(
        model_info=model_info,
        dataset_info=dataset_info,
        package_info=package_info(),
        system_info=system_info(
            accelerator=torch.cuda.get_device_name() if uses_gpu else "cpu",
            num_processes=str(PartialState().num_processes),
        ),
        pytorch_info=torch.__config__.show(),
    )


def _peft_config(update: Path | None) -> dict[str, Any] | None:
    if update is None or not (update / CONFIG_NAME).exists():
        return None
    config = json.loads((update / CONFIG_NAME).read_text(encoding="utf-8"))
    # PEFT keeps sets, which have another order in every process.
    return {key: sorted(value) if _is_names(value) else value for key, value in config.items()}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def table(record: Record) -> str:
    """Returns what was gained, what was lost and what it cost, as lines of text."""
    run, train = record.run_info, record.train_info
    found = train.metrics[-1]
    cells: list[tuple[str, str, str]] = [
        ("test accuracy on", "no update", run.train_config["method"]),
        ("target", _share(found[TARGET_BEFORE]), _share(found[TARGET])),
        ("source", _share(found[SOURCE_BEFORE]), _share(found[SOURCE])),
        ("retained", "", _share(found["retention"])),
        ("trained parameters", "0", f"{train.num_trainable_params:,}"),
        ("of the model", "0 %", f"{100 * (train.num_trainable_params or 0) / (train.num_total_params or 1):.1f} %"),
        ("saved bytes", "0", f"{train.file_size:,}"),
        ("training seconds", "0.0", f"{train.train_time or 0:.1f}"),
    ]
    rows = list(zip(*cells, strict=True))
    lines = [text_table(rows if run.train_config["method"] != "none" else rows[:-1])]
    for tried in train.sweep:
        lines.append(_tried(tried))
    if train.replay is not None:
        lines.append(_stored(train.replay))
    for name, difference in train.checks.items():
        what = name.removesuffix(_DIFFERENCE)
        lines.append(f"saved update, {what}: largest difference of a logit {difference:.1e}")
    if record.profile:
        lines += ["", profile_table(record.profile)]
    return "\n".join(lines)


def _tried(entry: dict[str, Any]) -> str:
    name = "statistics" if entry["learning_rate"] is None else f"learning rate {entry['learning_rate']:g}"
    increment = f"increment {entry['increment']}, " if "increment" in entry else ""
    outcome = "diverged" if "diverged" in entry else f"validation accuracy {entry['valid accuracy']:.3f}"
    return f"{increment}{name}: {outcome}"


def _stored(replay: dict[str, Any]) -> str:
    return (
        f"replay: trained from {replay['start']} on, on {replay['views']} stored views of {replay['images']} images, "
        f"{replay['size_bytes'] / 2**20:.1f} MiB in {replay['dtype']} (relative error {replay['relative_error']:.1e}), "
        f"stored once with {replay['fill_flops'] / 1e9:.3g} GFLOP"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
