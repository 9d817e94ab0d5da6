"""The record of a run, and the table that is printed from it."""

from __future__ import annotations

import json
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
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
from peft_edge.records import CANCELED, FAILED, SUCCESS, MetaInfo, Record, RunInfo, TrainInfo
from peft_edge.training.adaptation import Candidate
from peft_edge.training.run_folder import RunFolder

_DIFFERENCE = "_max_logit_difference"
_PACKAGES = ("accelerate", "datasets", "peft", "timm", "torch", "torchvision", "transformers")
_TARGET, _SOURCE = "test accuracy", "source test accuracy"
_TARGET_BEFORE, _SOURCE_BEFORE = f"{_TARGET} without update", f"{_SOURCE} without update"


def build_record(
    config: RunConfig,
    task: Task,
    source: nn.Module,
    *,
    started: float,
    total_time: float | None,
    before: tuple[float, float],
    after: tuple[float, float],
    candidates: list[Candidate],
    best: Candidate | None,
    update: Path | None,
    checks: dict[str, float],
) -> Record:
    """Puts together the record of a run that has succeeded.

    Args:
        config: The run's configuration.
        task: Its task.
        source: The source model.
        started: When the run started, in seconds since 1970.
        total_time: Seconds of the whole run; None for one that was resumed.
        before: Test accuracy on the target and on the source, without an update.
        after: The same with it.
        candidates: All that were trained.
        best: The one that was kept; None if nothing was trained.
        update: The folder of the saved adapter or model; None if there is none.
        checks: From `check_saved`.
    """
    last: dict[str, Any] = best.metrics[-1] if best else {"step": 0, "train loss": None}
    results = {
        "step": last["step"],
        "train loss": last["train loss"],
        "train samples": last["step"] * config.training.batch_size,
        _TARGET: after[0],
        _SOURCE: after[1],
        _TARGET_BEFORE: before[0],
        _SOURCE_BEFORE: before[1],
    }
    return Record(
        run_info=_run_info(config, started, total_time=total_time, peft_config=_peft_config(update)),
        train_info=TrainInfo(
            status=SUCCESS,
            train_time=best.train_time if best else None,
            file_size=sum(file.stat().st_size for file in update.glob("*.safetensors")) if update else 0,
            num_trainable_params=best.num_trainable_params if best else 0,
            num_total_params=sum(parameter.numel() for parameter in source.parameters()),
            metrics=[*(best.metrics if best else []), results],
            sweep=[
                {"learning_rate": candidate.learning_rate, "valid accuracy": candidate.validation_accuracy}
                for candidate in candidates
            ],
            checks=checks,
        ),
        meta_info=_meta_info(
            config,
            model_info={"sha": fingerprint(source), "created_at": None},
            dataset_info={task.name: {"sha": task.fingerprint, "created_at": None}},
        ),
        profile=best.profile if best else [],
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
        status = CANCELED if isinstance(error, KeyboardInterrupt) else FAILED
        message = "".join(traceback.format_exception(error))
        # A full disk may be why the run stops.
        with suppress(OSError):
            run.write_record(
                Record(
                    run_info=_run_info(config, started, error_msg=message),
                    train_info=TrainInfo(status=status),
                    meta_info=_meta_info(config, model_info={}, dataset_info={}),
                    profile=read_profile(run.path / "profile"),
                )
            )
        raise
    finally:
        _on_termination(previous or signal.SIG_DFL)


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
        package_info={f"{name}-version": version(name) for name in _PACKAGES},
        system_info={
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": torch.cuda.get_device_name() if uses_gpu else "cpu",
            "num_processes": str(PartialState().num_processes),
        },
        pytorch_info=torch.__config__.show(),
    )


def _peft_config(update: Path | None) -> dict[str, Any] | None:
    file = None if update is None else update / CONFIG_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else None


def table(record: Record) -> str:
    """Returns what was gained, what was lost and what it cost, as lines of text."""
    run, train = record.run_info, record.train_info
    results = train.metrics[-1]
    rows = [
        (
            "test accuracy on",
            "target",
            "source",
            "trained parameters",
            "of the model",
            "saved bytes",
            "training seconds",
        ),
        ("no update", f"{results[_TARGET_BEFORE]:.3f}", f"{results[_SOURCE_BEFORE]:.3f}", "0", "0 %", "0", "0"),
    ]
    if train.num_trainable_params and train.num_total_params:
        figures = (
            f"{results[_TARGET]:.3f}",
            f"{results[_SOURCE]:.3f}",
            f"{train.num_trainable_params:,}",
            f"{100 * train.num_trainable_params / train.num_total_params:.1f} %",
            f"{train.file_size:,}",
            f"{train.train_time:.1f}",
        )
        rows.append((run.train_config["method"], *figures))
    lines = [text_table(rows)]
    for tried in train.sweep:
        lines.append(f"learning rate {tried['learning_rate']:g}: validation accuracy {tried['valid accuracy']:.3f}")
    for name, difference in train.checks.items():
        what = name.removesuffix(_DIFFERENCE)
        lines.append(f"saved update, {what}: largest difference of a logit {difference:.1e}")
    if record.profile:
        lines += ["", profile_table(record.profile)]
    return "\n".join(lines)
