from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_edge.records import (
    SUCCESS,
    CostRecord,
    KernelChange,
    MetaInfo,
    Record,
    RunInfo,
    StepProfile,
    TrainInfo,
    add_record,
    load_average,
    package_info,
    read_archive,
    system_info,
)


def test_versions_and_the_lack_of_a_package_are_told() -> None:
    packages = package_info("no-such-package")
    assert packages["torch-version"] == torch.__version__.partition("+")[0]
    assert packages["no-such-package-version"] is None


def test_the_machine_is_named_with_what_else_is_given() -> None:
    machine = system_info(accelerator="cpu")
    assert (machine["system"], machine["accelerator"]) == (platform.system(), "cpu")
    assert all(isinstance(value, str) for value in machine.values())
    load = load_average()
    assert load is None or load >= 0


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


MakeRecord = Callable[..., Record]


@pytest.fixture
def cost() -> CostRecord:
    return CostRecord(
        created_at="",
        network="net",
        kind="standard",
        method="full",
        setting={"batch_size": 2},
        num_total_params=10,
        profile=StepProfile(process_index=0, scope="step", flops_forward=3),
        package_info={},
    )


def test_what_was_added_is_read(record: MakeRecord, cost: CostRecord, tmp_path: Path) -> None:
    run = record("lora", 0.9)
    file = add_record(tmp_path / "results", "lora--a", run)
    add_record(tmp_path / "results", "cost--a", cost)
    archive = read_archive(tmp_path)
    assert file.read_text(encoding="utf-8").count("\n") == 1
    assert archive.runs == {"results/lora--a.json": run}
    assert archive.costs == {"results/cost--a.json": cost}


def test_the_same_name_replaces(record: MakeRecord, tmp_path: Path) -> None:
    for accuracy in (0.1, 0.2):
        add_record(tmp_path, "a", record("lora", accuracy))
    assert read_archive(tmp_path).runs == {"a.json": record("lora", 0.2)}


def test_records_are_found_among_other_files(record: MakeRecord, tmp_path: Path) -> None:
    runs = {"a": record("lora", 0.9), "b": record("lora", 0.8), "c": record("lora", 0.1, status="failed")}
    for name, run in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(run.to_json(), encoding="utf-8")
    peft = record("lora", 0.7)
    peft.run_info.train_config = {"model_id": "a language model"}
    (tmp_path / "peft.json").write_text(peft.to_json(), encoding="utf-8")
    (tmp_path / "a" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "a" / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "a" / "broken.json").write_text("{", encoding="utf-8")
    archive = read_archive(tmp_path)
    assert list(archive.runs) == ["a/record.json", "b/record.json", "c/record.json"]
    assert list(archive.finished.values()) == [runs["a"], runs["b"]]


def test_a_record_that_lies_there_twice_counts_once(record: MakeRecord, tmp_path: Path) -> None:
    for name in ("a", "b"):
        add_record(tmp_path, name, record("lora", 0.9))
    assert list(read_archive(tmp_path).runs) == ["a.json"]


def test_a_damaged_record_is_named(record: MakeRecord, tmp_path: Path) -> None:
    text = record("lora", 0.9).to_json().replace('"train_time"', '"train_tame"')
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is damaged(?s:.*)train_tame"):
        read_archive(tmp_path)


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record: name a folder"):
        read_archive(tmp_path)
