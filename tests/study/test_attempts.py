from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from peft_edge import training
from peft_edge.archive import add_record, read_archive
from peft_edge.config import RunConfig
from peft_edge.hub.sharing import shareable
from peft_edge.records import DIVERGED, FAILED, SUCCESS
from peft_edge.study.attempts import Attempt
from peft_edge.study.cells import RunCell
from tests.study.support import FakeCell, done_in, fake_cell, record_of


def attempt_at(cell: RunCell, tmp_path: Path) -> Attempt:
    """As a study makes it that begins now."""
    return Attempt(cell, cell.record, tmp_path / "results")


def result_of(cell: RunCell, tmp_path: Path) -> object:
    return read_archive(tmp_path / "results").runs[f"{cell.result_name}.json"]


@pytest.fixture
def cell(tmp_path: Path) -> FakeCell:
    return fake_cell(tmp_path / "runs" / "a")


def test_what_is_done_is_written_down_twice_and_not_done_again(cell: FakeCell, tmp_path: Path) -> None:
    attempt = attempt_at(cell, tmp_path)
    assert not attempt.is_kept
    assert attempt.run()
    assert attempt.is_kept
    assert cell.status == SUCCESS
    assert result_of(cell, tmp_path) == shareable(cell.record)
    assert cell.log.read_text() == "this is a\n"

    assert attempt_at(cell, tmp_path).run()
    assert done_in(tmp_path / "runs") == ["a"]


def test_results_name_no_path_of_this_machine(cell: FakeCell, tmp_path: Path) -> None:
    attempt_at(cell, tmp_path).run()
    assert str(tmp_path) in cell.record.to_json()
    (result,) = (tmp_path / "results").iterdir()
    assert str(tmp_path) not in result.read_text()


def test_what_another_process_does_is_passed_over(cell: FakeCell, tmp_path: Path) -> None:
    attempt = attempt_at(cell, tmp_path)
    with FileLock(tmp_path / "runs" / "a.lock"):
        assert not attempt.run()
        assert not replace(attempt, patience_s=0.1).fail("killed")
    assert done_in(tmp_path / "runs") == []
    assert cell.record is None
    assert attempt.run()


def test_what_another_process_has_tried_since_is_tried_again_only_by_the_next_study(tmp_path: Path) -> None:
    ours, theirs = (attempt_at(fake_cell(tmp_path / "runs" / "a", "error"), tmp_path) for _ in range(2))
    assert theirs.run()
    assert theirs.cell.status == FAILED
    assert ours.run()
    assert done_in(tmp_path / "runs") == ["a"]

    again = attempt_at(fake_cell(tmp_path / "runs" / "a"), tmp_path)
    assert again.run()
    assert done_in(tmp_path / "runs") == ["a", "a"]
    assert again.cell.status == SUCCESS
    assert result_of(again.cell, tmp_path) == shareable(again.cell.record)


def test_a_failure_that_leaves_no_record_gets_one(tmp_path: Path) -> None:
    cell = fake_cell(tmp_path / "runs" / "a", "error")
    assert attempt_at(cell, tmp_path).run()
    record = cell.record
    assert (record.train_info.status, record.run_info.experiment_name) == (FAILED, "lora/a")
    assert record.run_info.error_msg.endswith("RuntimeError: a fails\n")
    assert result_of(cell, tmp_path) == shareable(record)
    assert cell.log.read_text().startswith("this is a\nTraceback")


def test_a_failure_that_leaves_a_record_keeps_it(tmp_path: Path) -> None:
    cell = fake_cell(tmp_path / "runs" / "a", DIVERGED)
    assert attempt_at(cell, tmp_path).run()
    assert cell.status == DIVERGED
    assert result_of(cell, tmp_path) == shareable(cell.record)
    assert attempt_at(cell, tmp_path).is_kept


def test_a_cell_whose_process_has_died_has_failed(cell: FakeCell, tmp_path: Path) -> None:
    assert attempt_at(cell, tmp_path).fail("killed (SIGKILL)")
    assert (cell.status, cell.record.run_info.error_msg) == (FAILED, "killed (SIGKILL)")
    assert result_of(cell, tmp_path) == shareable(cell.record)
    assert "SIGKILL" in cell.log.read_text()


def test_a_process_that_dies_after_its_cell_was_done_takes_nothing_away(cell: FakeCell, tmp_path: Path) -> None:
    attempt = attempt_at(cell, tmp_path)
    add_record(cell.folder, "record", record_of(cell.config))
    assert attempt.fail("killed")
    assert cell.status == SUCCESS
    assert result_of(cell, tmp_path) == shareable(cell.record)


@pytest.mark.parametrize("found", ["nothing", "an older record", "half a record"])
def test_results_are_completed_from_what_is_finished(cell: FakeCell, tmp_path: Path, found: str) -> None:
    assert attempt_at(cell, tmp_path).run()
    file = tmp_path / "results" / "lora--a.json"
    if found == "nothing":
        file.unlink()
    elif found == "an older record":
        add_record(tmp_path / "results", "lora--a", record_of(cell.config, FAILED))
    else:
        file.write_text(file.read_text()[:100])
    attempt = attempt_at(cell, tmp_path)
    assert not attempt.is_kept
    assert attempt.run()
    assert attempt.is_kept
    assert result_of(cell, tmp_path) == shareable(cell.record)
    assert done_in(tmp_path / "runs") == ["a"]


def test_a_damaged_record_is_named(cell: FakeCell, tmp_path: Path) -> None:
    attempt = attempt_at(cell, tmp_path)
    cell.folder.mkdir(parents=True)
    (cell.folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        attempt.run()


def test_a_run_that_cannot_begin_leaves_the_folder_of_another_as_it_is(tmp_path: Path) -> None:
    other = RunConfig(output_dir=str(tmp_path / "runs" / "a"), method="head", trackers=[])
    cell = RunCell("a", tmp_path / "runs" / "a", other.model_copy(update={"method": "bias"}))
    add_record(cell.folder, "record", theirs := record_of(other))
    assert attempt_at(cell, tmp_path).run()
    assert training.read_record(cell.folder) == theirs
    assert cell.status == FAILED
    assert "holds no run: choose another folder" in cell.record.run_info.error_msg
    assert result_of(cell, tmp_path) == shareable(cell.record)
