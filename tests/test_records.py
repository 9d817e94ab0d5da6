from __future__ import annotations

import json

import pytest

from peft_edge.records import SUCCESS, KernelChange, MetaInfo, Record, RunInfo, StepProfile, TrainInfo


@pytest.fixture
def record() -> Record:
    return Record(
        run_info=RunInfo(
            created_at="2025-01-01T00:00:00+00:00", experiment_name="lora/a", train_config={"model_id": "m"}
        ),
        train_info=TrainInfo(
            status=SUCCESS,
            metrics=[{"step": 1, "train loss": 0.5, "train samples": 32}],
            changes={"conv": KernelChange(kind="dense", relative_norm=0.5, stable_rank=1.5)},
        ),
        meta_info=MetaInfo(
            model_info={}, dataset_info={}, package_info={"peft-version": "0"}, system_info={}, pytorch_info=""
        ),
        profile=[StepProfile(process_index=1, scope="layers", lora_rank=4, flops_forward=10, forward_s=0.5)],
    )


def test_record_is_read_back_the_same(record: Record) -> None:
    assert Record.from_json(record.to_json()) == record


def test_blocks_and_fields_are_those_of_pefts_method_comparison(record: Record) -> None:
    """The names that PEFT's `method_comparison/processing.py` reads."""
    blocks = json.loads(record.to_json())
    assert blocks.keys() >= {"run_info", "train_info", "meta_info"}
    assert blocks["run_info"].keys() >= {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    }  # fmt: skip
    assert blocks["train_info"].keys() >= {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    }  # fmt: skip
    assert blocks["meta_info"].keys() >= {
        "model_info", "dataset_info", "package_info", "system_info", "pytorch_info",
    }  # fmt: skip


def test_what_was_not_measured_is_null(record: Record) -> None:
    train_info = json.loads(record.to_json())["train_info"]
    assert train_info["accelerator_memory_max"] is None
    assert train_info["file_size"] is None


def test_profile_names_process_and_rank(record: Record) -> None:
    (row,) = json.loads(record.to_json())["profile"]
    assert (row["process_index"], row["lora_rank"], row["flops_forward"]) == (1, 4, 10)
    assert row["memory_peak_bytes"] is None
    assert "rank" not in row


def test_record_without_a_profile_is_read(record: Record) -> None:
    blocks = json.loads(record.to_json())
    del blocks["profile"]
    assert Record.from_json(json.dumps(blocks)).profile == []


def test_nan_is_refused(record: Record) -> None:
    record.train_info.train_time = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        record.to_json()


@pytest.mark.parametrize("text", ["{", "[]", '{"run_info": {}}', '{"other": {}}', '{"profile": [{"rank": 4}]}'])
def test_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own error for the first
        Record.from_json(text)
