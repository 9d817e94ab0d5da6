from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from accelerate import Accelerator

from peft_edge.config import load_config
from peft_edge.records import (
    CANCELED,
    FAILED,
    SUCCESS,
    MetaInfo,
    Record,
    RunInfo,
    StepProfile,
    TrainInfo,
    TrainingCosts,
)
from peft_edge.training.run_folder import open_run
from peft_edge.training.summary import failure_recorded, new_record, retention_warning, summary_table
from tests.training.support import record_of


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("lost"), FAILED), (KeyboardInterrupt(), CANCELED)])
def test_a_run_that_fails_leaves_a_record(tmp_path: Path, error: BaseException, status: str) -> None:
    config = load_config([f"output_dir={tmp_path / 'run'}", "data.shift=blend"])
    run = open_run(config, Accelerator(cpu=True))
    with pytest.raises(type(error)), failure_recorded(run, 0.0):
        raise error
    record = record_of(tmp_path / "run")
    assert record.train_info.status == status
    assert type(error).__name__ in record.run_info.error_msg
    assert record.run_info.created_at == "1970-01-01T00:00:00+00:00"
    assert run.record is None


def test_an_error_after_success_keeps_the_record(tmp_path: Path) -> None:
    config = load_config([f"output_dir={tmp_path / 'run'}", "data.shift=blend"])
    run = open_run(config, Accelerator(cpu=True))
    run.write_record(new_record(config, SUCCESS, started=1.0))
    with pytest.raises(OSError, match="lost"), failure_recorded(run, 0.0):
        raise OSError("lost")
    assert record_of(tmp_path / "run") == new_record(config, SUCCESS, started=1.0)


def test_the_record_of_a_failed_run_holds_the_profile_measured_so_far(tmp_path: Path) -> None:
    config = load_config([f"output_dir={tmp_path}", "data.shift=blend"])
    run = open_run(config, Accelerator(cpu=True))
    rows = [StepProfile(process_index=index, scope="step", steps=1) for index in (10, 2)]
    (tmp_path / "profile" / "lr_0.01").mkdir(parents=True)
    for row in rows:
        file = tmp_path / "profile" / "lr_0.01" / f"process_{row.process_index}.json"
        file.write_text(json.dumps({"rows": [vars(row)], "times": []}))
    with pytest.raises(RuntimeError), failure_recorded(run, 0.0):
        raise RuntimeError("lost")
    assert record_of(tmp_path).profile == rows[::-1]


def test_a_terminated_run_leaves_a_record(tmp_path: Path) -> None:
    config = load_config([f"output_dir={tmp_path}", "data.shift=blend"])
    run = open_run(config, Accelerator(cpu=True))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, failure_recorded(run, 0.0):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert record_of(tmp_path).train_info.status == FAILED
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_summary_table_shows_gain_loss_and_cost() -> None:
    results = {
        "test accuracy": 0.75,
        "source test accuracy": 0.9,
        "test accuracy without update": 0.25,
        "source test accuracy without update": 0.95,
        "retention": 0.947,
    }
    record = Record(
        run_info=RunInfo(created_at="", experiment_name="lora/a", train_config={"method": "lora"}),
        train_info=TrainInfo(
            status="success",
            train_time=12.34,
            file_size=4000,
            num_trainable_params=1000,
            num_total_params=20000,
            metrics=[results],
            sweep=[
                {"learning_rate": 0.01, "valid accuracy": 0.7},
                {"increment": 2, "learning_rate": 10.0, "valid accuracy": None, "diverged": "why"},
                {"learning_rate": None, "valid accuracy": 0.5},
            ],
            checks={"merged_max_logit_difference": 2e-6},
        ),
        meta_info=MetaInfo(model_info={}, dataset_info={}, package_info={}, system_info={}, pytorch_info=""),
        profile=[StepProfile(process_index=0, scope="step", forward_s=0.0123)],
    )
    lines = summary_table(record).splitlines()
    header = (
        "test accuracy on  target  source  retained  trained parameters  of the model  saved bytes  training seconds"
    )
    assert lines[0].split() == header.split()
    assert lines[1].split() == ["no", "update", "0.250", "0.950", "0", "0", "%", "0", "0.0"]
    assert lines[2].split() == ["lora", "0.750", "0.900", "0.947", "1,000", "5.0", "%", "4,000", "12.3"]
    assert lines[3:9] == [
        "learning rate 0.01: validation accuracy 0.700",
        "increment 2, learning rate 10: diverged",
        "statistics: validation accuracy 0.500",
        "saved update, merged: largest difference of a logit 2.0e-06",
        "",
        "arithmetic and time of a training step",
    ]
    assert "12.3" in lines[11]

    seconds = {"total_s": 20.0, "step_s": 1.2, "loading_s": 0.0, "storing_s": 18.8, "statistics_s": 0.0}
    costs = TrainingCosts(**seconds, validation_s=2.0, flops=12 * 10**11, process_peak_bytes=1500 * 2**20)
    record.train_info.costs = costs
    record.profile[0].memory_peak_bytes = 14 * 2**20
    text = summary_table(record)
    assert text.splitlines()[2].endswith(" 20.0")
    assert "training: 1.2 s optimizer steps, 18.8 s storing features; in addition, 2.0 s validation" in text
    assert "peak memory: 14.0 MiB tensors in a step, 1,500.0 MiB whole process" in text
    assert "arithmetic of the whole training: 1.2 TFLOP" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"keeps only 13% of .*\(0.925 before, 0.119 after\)\. .*: set norm=frozen.*\(norm is stats\)"),
        ({"method": "norm-stats"}, "use another method with norm=frozen: norm-stats replaces"),
        ({"method": "peft-lora"}, r"set norm=frozen.*\(norm is stats\)"),
        ({"method": "peft-lora", "norm": "frozen"}, "lower training.learning_rate or"),
        ({"norm": "frozen"}, "lower training.learning_rate or"),
        ({"method": "full"}, "use an adapter such as lora with norm=frozen"),
        ({"norm": "frozen", "data": {"new_classes": ["a"]}}, "raise data.rehearsal_size"),
    ],
)
def test_a_lost_source_is_warned_about(changes: dict[str, object], message: str) -> None:
    config = load_config(["output_dir=a", "data.shift=blend", "norm=stats"])
    record = new_record(config, SUCCESS, started=0.0)
    record.run_info.train_config |= changes
    lost = {"source test accuracy without update": 0.925, "source test accuracy": 0.119, "retention": 0.119 / 0.925}
    record.train_info.metrics = [lost]
    assert re.search(message, retention_warning(record) or "")
    for kept in (0.5, None):
        record.train_info.metrics = [{**lost, "retention": kept}]
        assert retention_warning(record) is None
