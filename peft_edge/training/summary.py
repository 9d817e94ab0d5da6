"""Build the record of a run, and format a record as a text table."""

from __future__ import annotations

import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate import PartialState
from peft.utils import CONFIG_NAME
from torch import nn

from peft_edge.allocator import huge_page_state
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
    JsonObject,
    KernelChange,
    MetaInfo,
    Record,
    RunInfo,
    TrainInfo,
    TrainingCosts,
    package_info,
    system_info,
)
from peft_edge.training.adaptation import TrainedCandidate
from peft_edge.training.evaluation import SOURCE, SOURCE_BEFORE, TARGET, TARGET_BEFORE, Predictions, results
from peft_edge.training.loop import DivergedError, on_termination
from peft_edge.training.run_folder import ActiveRun

logger = logging.getLogger(__name__)


def build_record(
    run: ActiveRun,
    task: Task,
    source: nn.Module,
    *,
    started: float,
    total_time: float | None,
    predictions: list[list[Predictions]],
    chosen: list[TrainedCandidate],
    tried: list[dict[str, object]],
    update: Path | None,
    checks: dict[str, float],
    changes: dict[str, KernelChange],
) -> Record:
    """Return the record of a run that has succeeded.

    `started` is the start of the run in seconds since 1970. `total_time` is in seconds, and None for a resumed run.
    `predictions` contains the test predictions of the source model, then those of the model after adaptation to each
    target. `chosen` contains the best candidate for each target. `tried` contains one dict for each target and learning
    rate, as returned by `sweep`. `update` is the folder of the saved adapter or model, or None for `method="none"`.
    `checks` is the result of `check_saved`, and `changes` is the result of `kernel_changes`, both for the last target.
    """
    config = run.config
    steps = sum(int(best.metrics[-1]["step"] or 0) for best in chosen)
    last = chosen[-1] if chosen else None
    tests = {
        "step": steps,
        "train loss": last.metrics[-1]["train loss"] if last else None,
        "train samples": steps * config.training.batch_size,
        **results(predictions),
    }
    record = new_record(config, SUCCESS, started=started)
    record.run_info.total_time = total_time
    record.train_info = TrainInfo(
        status=SUCCESS,
        train_time=sum(best.train_time for best in chosen) if last else None,
        costs=_sum_of([best.costs for best in chosen]),
        file_size=sum(file.stat().st_size for file in update.glob("*.safetensors")) if update else 0,
        num_trainable_params=last.num_trainable_params if last else 0,
        num_total_params=sum(parameter.numel() for parameter in source.parameters()),
        metrics=[*(epoch for best in chosen for epoch in best.metrics), tests],
        sweep=tried,
        replay=last.replay if last else None,
        checks=checks,
        changes=changes,
    )
    record.meta_info.model_info = {"sha": fingerprint(source), "created_at": None}
    record.meta_info.dataset_info = {task.name: {"sha": task.fingerprint, "created_at": None}}
    record.profile = last.profile if last else []
    if update is not None and (update / CONFIG_NAME).exists():
        saved = json.loads((update / CONFIG_NAME).read_text(encoding="utf-8"))
        # PEFT writes a set of names in a different order in each process, so sort the names.
        record.run_info.peft_config = {
            key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
            for key, value in saved.items()
        }
    return record


def new_record(config: RunConfig, status: str, *, started: float, error_msg: str = "") -> Record:
    """Return a record with `status` and without results. `started` is the start of the run in seconds since 1970."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not config.cpu else "cpu"
    return Record(
        run_info=RunInfo(
            created_at=datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            experiment_name=f"{config.method}/{Path(config.output_dir).name}",
            train_config={"model_id": config.backbone.name, **config.model_dump()},
            error_msg=error_msg,
        ),
        train_info=TrainInfo(status=status),
        meta_info=MetaInfo(
            model_info={},
            dataset_info={},
            package_info=package_info(),
            system_info=system_info(
                accelerator=device, num_processes=str(PartialState().num_processes), huge_pages=huge_page_state()
            ),
            pytorch_info=torch.__config__.show(),
        ),
    )


def _sum_of(costs: list[TrainingCosts]) -> TrainingCosts | None:
    """Return the costs of all targets together, or None if `costs` is empty.

    In the result, `process_peak_bytes` is the maximum over `costs`, and every other field is the sum. If a field is
    None in any element of `costs`, it is None in the result.
    """
    if not costs:
        return None
    columns = {name: [getattr(each, name) for each in costs] for name in TrainingCosts.model_fields}
    merged: JsonObject = {
        name: None if None in values else max(values) if name == "process_peak_bytes" else sum(values)
        for name, values in columns.items()
    }
    return TrainingCosts(**merged)


@contextmanager
def failure_recorded(run: ActiveRun, started: float) -> Iterator[None]:
    """If the `with` block raises an error, write a record that contains the error, and raise the error again.

    Only the main process writes the record. If `run` already has a record of success, that record is kept. Inside the
    block, SIGTERM raises SystemExit. Therefore a record is also written if a launcher sends SIGTERM to this process
    because another process has died.
    """
    with on_termination(lambda number, frame: sys.exit(128 + number)):
        try:
            yield
        except BaseException as error:
            if run.is_finished:
                # Keep the record of success.
                raise
            message = "".join(traceback.format_exception(error))
            # A full disk must not hide the original error, and a second SIGTERM must not interrupt `write_record`.
            with on_termination(signal.SIG_IGN):
                try:
                    status = {KeyboardInterrupt: CANCELED, DivergedError: DIVERGED}.get(type(error), FAILED)
                    record = new_record(run.config, status, started=started, error_msg=message)
                    record.train_info.sweep = list(getattr(error, "tried", ()))
                    record.profile = read_profile(run.path / "profile")
                    run.write_record(record)
                except OSError as unwritten:
                    logger.warning("the failure could not be recorded in %s: %s", run.path, unwritten)
            raise


def retention_warning(record: Record) -> str | None:
    """Return a warning if adaptation lost more than half of the accuracy on the source domain, otherwise None."""
    config, results = record.run_info.train_config, record.train_info.metrics[-1]
    if results["retention"] is None or results["retention"] >= 0.5:
        return None
    if config["method"].startswith("norm-"):
        remedy = f"use another method with norm=frozen: {config['method']} replaces the source's BatchNorm statistics"
    elif config["method"] == "full":
        remedy = "use an adapter such as lora with norm=frozen, which changes less than all weights"
    elif config["norm"] != "frozen":
        remedy = f"set norm=frozen, which keeps the source's BatchNorm statistics (norm is {config['norm']})"
    elif config["data"]["new_classes"]:
        remedy = "raise data.rehearsal_size, or lower training.learning_rate"
    else:
        remedy = "lower training.learning_rate or training.epochs, or adapt fewer layers"
    return (
        f"the update keeps only {results['retention']:.0%} of the accuracy on the source ({results[SOURCE_BEFORE]:.3f} "
        f"before, {results[SOURCE]:.3f} after). If the model must still work on the source: {remedy}"
    )


def summary_table(record: Record) -> str:
    """Return a text with the accuracies, sizes, times, learning rates, checks and step profiles of a successful run."""
    config, train = record.run_info.train_config, record.train_info
    names = (TARGET, SOURCE, TARGET_BEFORE, SOURCE_BEFORE, "retention")
    tests = {name: "-" if (value := train.metrics[-1][name]) is None else f"{value:.3f}" for name in names}
    columns = [
        ("test accuracy on", "no update", config["method"]),
        ("target", tests[TARGET_BEFORE], tests[TARGET]),
        ("source", tests[SOURCE_BEFORE], tests[SOURCE]),
        ("retained", "", tests["retention"]),
        ("trained parameters", "0", f"{train.num_trainable_params:,}"),
        ("of the model", "0 %", f"{100 * (train.num_trainable_params or 0) / (train.num_total_params or 1):.1f} %"),
        ("saved bytes", "0", f"{train.file_size:,}"),
        ("training seconds", "0.0", f"{train.seconds or 0:.1f}"),
    ]
    rows = list(zip(*columns, strict=True))
    lines = [text_table(rows if config["method"] != "none" else rows[:-1])]
    for entry in train.sweep:
        increment = f"increment {entry['increment']}, " if "increment" in entry else ""
        name = "statistics" if entry["learning_rate"] is None else f"learning rate {entry['learning_rate']:g}"
        outcome = "diverged" if "diverged" in entry else f"validation accuracy {entry['valid accuracy']:.3f}"
        lines.append(f"{increment}{name}: {outcome}")
    if replay := train.replay:
        lines.append(
            f"replay: trained from {replay['start']} on, on {replay['views']} stored views of {replay['images']} "
            f"images, {replay['size_bytes'] / 2**20:.1f} MiB in {replay['dtype']} (relative error "
            f"{replay['relative_error']:.1e}), stored once with {replay['fill_flops'] / 1e9:.3g} GFLOP"
        )
    if costs := train.costs:
        parts = {
            "optimizer steps": costs.step_s,
            "loading images" if train.replay is None else "reading features": costs.loading_s,
            "storing features": costs.storing_s,
            "estimating statistics": costs.statistics_s,
        }
        spent = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in parts.items() if seconds)
        lines.append(f"training: {spent}; in addition, {costs.validation_s:.1f} s validation")
        tensors = None if record.step is None else record.step.memory_peak_bytes
        peaks = {"tensors in a step": tensors, "whole process": costs.process_peak_bytes}
        found = [f"{peak / 2**20:,.1f} MiB {name}" for name, peak in peaks.items() if peak is not None]
        lines += [f"peak memory: {', '.join(found)}"] if found else []
        lines += [] if costs.flops is None else [f"arithmetic of the whole training: {costs.flops / 1e12:.3g} TFLOP"]
    for name, difference in train.checks.items():
        form = name.removesuffix("_max_logit_difference")
        lines.append(f"saved update, {form}: largest difference of a logit {difference:.1e}")
    if record.profile:
        lines += ["", profile_table(record.profile)]
    return "\n".join(lines)
