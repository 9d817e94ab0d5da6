from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from peft_edge import training
from peft_edge.archive import add_record
from peft_edge.config import RunConfig
from peft_edge.records import CANCELED, DIVERGED, FAILED, SUCCESS
from peft_edge.study.cells import RunCell
from tests.study.support import record_of


def run_cell(folder: Path, **keys: Any) -> RunCell:
    return RunCell("a setting", folder, RunConfig(output_dir=str(folder), **keys))


def leave_record(cell: RunCell, status: str, created_at: str = "2020-01-01T00:00:00+00:00") -> None:
    add_record(cell.folder, "record", record_of(cell.config, status, created_at))


@pytest.mark.parametrize(
    ("status", "is_finished"), [(SUCCESS, True), (DIVERGED, True), (FAILED, False), (CANCELED, False)]
)
def test_only_what_may_end_otherwise_is_not_finished(tmp_path: Path, status: str, is_finished: bool) -> None:
    cell = run_cell(tmp_path / "a")
    assert (cell.status, cell.is_finished) == ("not run", False)
    leave_record(cell, status)
    assert (cell.status, cell.is_finished) == (status, is_finished)


def test_a_run_has_the_names_of_its_folder(tmp_path: Path) -> None:
    cell = run_cell(tmp_path / "a--seed=0", method="lora-fa")
    assert (cell.name, cell.log) == ("a--seed=0", tmp_path / "a--seed=0.log")
    assert cell.result_name == "lora-fa--a--seed=0"
    assert pickle.loads(pickle.dumps(cell)) == cell


def test_runs_share_a_source_unless_what_it_is_made_of_differs(tmp_path: Path) -> None:
    source = run_cell(tmp_path / "a").source
    assert run_cell(tmp_path / "b", method="full", adapter={"r": 8}).source == source
    assert run_cell(tmp_path / "a", seed=1).source != source
    assert run_cell(tmp_path / "a", backbone={"name": "resnet10t"}).source != source


def test_a_folder_may_have_been_moved(tmp_path: Path) -> None:
    leave_record(run_cell(tmp_path / "a"), SUCCESS)
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_cell(tmp_path / "b").is_finished


def test_the_record_of_another_recipe_is_not_this_ones(tmp_path: Path) -> None:
    old = run_cell(tmp_path / "a", training={"epochs": 3})
    leave_record(old, SUCCESS)
    old.record_failure("killed")
    assert run_cell(tmp_path / "a").record is None


def test_the_last_failure_counts_until_a_run_comes_after_it(tmp_path: Path) -> None:
    cell = run_cell(tmp_path / "a")
    leave_record(cell, CANCELED)
    cell.record_failure("killed")
    assert (cell.status, cell.record.run_info.error_msg) == (FAILED, "killed")
    leave_record(cell, DIVERGED, "2999-01-01T00:00:00+00:00")
    assert cell.status == DIVERGED


def test_a_failure_does_not_begin_the_folder_and_goes_away_with_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = run_cell(tmp_path / "a")
    cell.record_failure("killed")
    # A folder with a record and no configuration would be taken for something else.
    assert not cell.folder.exists()

    monkeypatch.setattr(training, "run", lambda config: leave_record(cell, SUCCESS, "2000-01-01T00:00:00+00:00"))
    cell.run()
    assert cell.status == SUCCESS
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
