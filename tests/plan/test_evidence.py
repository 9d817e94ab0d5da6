from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.plan.evidence import evidence, on_backbone, read_records
from peft_edge.records import Record

MakeRecord = Callable[..., Record]


LORA, HEAD = ("lora", "dense", 4, "stats"), ("head", None, None, "stats")


def test_ways_are_compared_on_the_same_task(record: MakeRecord) -> None:
    # LoRA is better on either task, and was tried more often on the hard one.
    runs = [record("lora", 0.9), record("head", 0.8), record("head", 0.8)]
    runs += [record("lora", accuracy, task="hard") for accuracy in (0.3, 0.4)] + [record("head", 0.1, task="hard")]
    known = evidence(runs)
    assert known[LORA].accuracy == pytest.approx((0.9 + 0.3 + 0.4) / 3)
    assert (known[LORA].runs, known[HEAD].runs) == (3, 3)
    assert known[LORA].accuracy < known[HEAD].accuracy
    means = ((0.9 + 0.8 + 0.8) / 3, (0.3 + 0.4 + 0.1) / 3)
    assert known[LORA].advantage == pytest.approx(((0.9 - means[0]) + (0.35 - means[1])) / 2)
    assert known[LORA].advantage > known[HEAD].advantage


def test_records_are_found_among_other_files(record: MakeRecord, tmp_path: Path) -> None:
    runs = {
        "a": record("lora", 0.9),
        "b": record("lora", 0.8, backbone="other"),
        "c": record("lora", 0.1, status="failed"),
    }
    for name, run in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(run.to_json(), encoding="utf-8")
    peft = record("lora", 0.7)
    peft.run_info.train_config = {"model_id": "a language model"}
    (tmp_path / "peft.json").write_text(peft.to_json(), encoding="utf-8")
    (tmp_path / "a" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "a" / "broken.json").write_text("{", encoding="utf-8")
    found = read_records(tmp_path)
    assert [run.train_info.metrics[-1]["test accuracy"] for run in found] == [0.9, 0.8]
    assert on_backbone(found, "other") == found[1:]


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record of a run that has succeeded"):
        read_records(tmp_path)
