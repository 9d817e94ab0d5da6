from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.archive import add_record, read_archive
from peft_edge.records import CostRecord, Record, StepProfile

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
