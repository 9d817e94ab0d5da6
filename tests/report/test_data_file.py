from __future__ import annotations

import csv
import io
from collections.abc import Callable

from peft_edge.records import Archive, Record
from peft_edge.report.data_file import data_file


def rows_of(text: str) -> dict[str, dict[str, str]]:
    return {row["file"]: row for row in csv.DictReader(io.StringIO(text))}


def test_a_row_for_every_record(archive: Archive, run: Callable[..., Record]) -> None:
    archive.runs["failed.json"] = run(status="failed")
    rows = rows_of(data_file(archive, "results"))
    assert set(rows) == {f"results/{name}" for name in archive.runs | archive.costs}
    assert rows["results/failed.json"]["train.status"] == "failed"
    assert rows["results/failed.json"]["result.test accuracy"] == ""


def test_figures_come_back_as_they_were(archive: Archive) -> None:
    rows = rows_of(data_file(archive))
    name, record = next((name, run) for name, run in archive.runs.items() if run.train_info.changes)
    row = rows[name]
    assert float(row["result.test accuracy"]) == record.train_info.metrics[-1]["test accuracy"]
    assert int(row["step.memory_peak_bytes"]) == record.profile[0].memory_peak_bytes
    assert row["config.data.new_classes"] == "[]"
    assert float(row["changes.pointwise.relative_norm"]) > 0
    name, cost = next(iter(archive.costs.items()))
    assert rows[name]["setting.accounting"] == cost.setting["accounting"]
    assert int(rows[name]["step.flops_forward"]) == cost.profile.flops_forward


def test_no_folder_of_a_machine_is_in_it(archive: Archive) -> None:
    assert "/somewhere" not in data_file(archive)
