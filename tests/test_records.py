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
    TrainingCosts,
    add_record,
    load_average,
    package_info,
    read_archive,
    read_record,
    system_info,
)

RESULTS = Path(__file__).parents[1] / "reports" / "results"
MakeRecord = Callable[..., Record]


@pytest.fixture
def run() -> Record:
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


def test_record_is_read_back_unchanged(run: Record, cost: CostRecord) -> None:
    assert Record.from_json(run.to_json()) == run
    assert CostRecord.from_json(cost.to_json()) == cost


def test_published_records_are_read_and_written_unchanged() -> None:
    archive = read_archive(RESULTS)
    records = archive.runs | archive.costs
    assert records.keys() == {file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob("*.json")}
    for name, record in records.items():
        assert json.loads(record.to_json()) == json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_blocks_and_fields_are_those_of_pefts_method_comparison(run: Record) -> None:
    """The names that PEFT's `method_comparison/processing.py` reads."""
    blocks = json.loads(run.to_json())
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


def test_value_that_was_not_measured_is_null(run: Record) -> None:
    train_info = json.loads(run.to_json())["train_info"]
    assert train_info["accelerator_memory_max"] is None
    assert train_info["file_size"] is None


def test_profile_names_process_and_rank(run: Record) -> None:
    (row,) = json.loads(run.to_json())["profile"]
    assert (row["process_index"], row["lora_rank"], row["flops_forward"]) == (1, 4, 10)
    assert row["memory_peak_bytes"] is None
    assert "rank" not in row


def test_costs_of_training_are_absent_unless_they_were_measured(run: Record) -> None:
    assert "costs" not in json.loads(run.to_json())["train_info"]
    run.train_info.train_time = 3.0
    assert run.train_info.seconds == 3.0
    parts = {"step_s": 3.0, "loading_s": 1.0, "storing_s": 2.0, "statistics_s": 0.5}
    run.train_info.costs = TrainingCosts(
        total_s=sum(parts.values()), **parts, validation_s=9.0, flops=None, process_peak_bytes=10
    )
    assert run.train_info.seconds == 6.5
    assert Record.from_json(run.to_json()) == run


def test_record_without_a_profile_is_read(run: Record) -> None:
    blocks = json.loads(run.to_json())
    del blocks["profile"]
    assert Record.from_json(json.dumps(blocks)).profile == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(run: Record, tmp_path: Path, value: float) -> None:
    run.train_info.train_time = value
    with pytest.raises(ValueError, match="JSON compliant"):
        run.to_json()
    with pytest.raises(ValueError, match="JSON compliant"):
        add_record(tmp_path, "a", run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "text: Invalid JSON"),
        ("[]", "text: Input should be an object"),
        ('{"run_info": {}}', "run_info.created_at: Field required; run_info.experiment_name: Field required"),
        ('{"other": {}}', "other: Extra inputs are not permitted"),
        ('{"profile": [{"rank": 4}]}', "profile.0.rank: Extra inputs are not permitted"),
    ],
)
def test_damaged_record_is_refused_with_its_file_and_fields(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is damaged") as caught:
        read_record(tmp_path / "a.json", Record)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="not a Record: "):
        Record.from_json(text)


def test_missing_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "a.json", Record) is None


def test_added_records_are_found(record: MakeRecord, cost: CostRecord, tmp_path: Path) -> None:
    run = record("lora", 0.9)
    file = add_record(tmp_path / "results", "lora--a", run)
    add_record(tmp_path / "results", "cost--a", cost)
    archive = read_archive(tmp_path)
    assert file.read_text(encoding="utf-8").count("\n") == 1
    assert archive.runs == {"results/lora--a.json": run}
    assert archive.costs == {"results/cost--a.json": cost}


def test_record_of_the_same_name_is_replaced(record: MakeRecord, tmp_path: Path) -> None:
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


def test_two_copies_of_a_record_count_once(record: MakeRecord, cost: CostRecord, tmp_path: Path) -> None:
    for name in ("a", "b"):
        add_record(tmp_path, name, record("lora", 0.9))
        add_record(tmp_path, f"cost-{name}", cost)
    archive = read_archive(tmp_path)
    assert list(archive.runs) == ["a.json"]
    assert list(archive.costs) == ["cost-a.json"]


def test_damaged_record_in_a_folder_is_named(record: MakeRecord, tmp_path: Path) -> None:
    text = record("lora", 0.9).to_json().replace('"train_time"', '"train_tame"')
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json has fields that this version .*newer one(?s:.*)train_tame"):
        read_archive(tmp_path)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
    text = record("lora", 0.9).to_json().replace('"status": "success"', '"status": 3')
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is damaged(?s:.*)status"):
        read_archive(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["record.json", "lora--a.json", "cost--a.json"])
def test_record_that_is_cut_short_is_named_and_kept(
    name: str, share: float, record: MakeRecord, cost: CostRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_record(tmp_path, "whole", record("lora", 0.9))
    text = (cost if name.startswith("cost") else record("lora", 0.8)).to_json()
    cut = text[: int(share * len(text))]
    (tmp_path / name).write_text(cut, encoding="utf-8")
    if share > 0.01 or name == "record.json":
        with pytest.raises(ValueError, match=f"{name} is a record that is cut short"):
            read_archive(tmp_path)
    else:
        # So little is left that nobody knows what it was.
        assert list(read_archive(tmp_path).runs) == ["whole.json"]
        assert f"{name} is no JSON, and was left out" in caplog.text
    assert (tmp_path / name).read_text(encoding="utf-8") == cut


def test_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record: name a folder"):
        read_archive(tmp_path)


def test_package_versions_are_listed_and_a_missing_package_is_none() -> None:
    packages = package_info("no-such-package")
    assert packages["torch-version"] == torch.__version__.partition("+")[0]
    assert packages["no-such-package-version"] is None


def test_machine_is_described_with_additional_entries() -> None:
    machine = system_info(accelerator="cpu")
    assert (machine["system"], machine["accelerator"]) == (platform.system(), "cpu")
    assert all(isinstance(value, str) for value in machine.values())
    load = load_average()
    assert load is None or load >= 0


def test_record_without_some_keys_of_the_configuration_is_named(tmp_path: Path, record: Callable[..., Record]) -> None:
    run = record("lora", 0.5)
    del run.run_info.train_config["norm"]
    add_record(tmp_path, "a", run)
    with pytest.raises(ValueError, match=r"a\.json is a record whose run_info.train_config lacks norm"):
        read_archive(tmp_path)


def test_record_of_pefts_benchmark_is_left_out(tmp_path: Path, record: Callable[..., Record]) -> None:
    add_record(tmp_path, "ours", record("lora", 0.5))
    run = record("lora", 0.5)
    run.run_info.train_config = {"model_id": "meta-llama/Llama-3.2-3B", "batch_size": 4}
    add_record(tmp_path, "theirs", run)
    (tmp_path / "folder.json").mkdir()
    assert [*read_archive(tmp_path).runs] == ["ours.json"]
