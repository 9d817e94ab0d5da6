"""Jobs and their records, locks and failures."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from peft_edge import training
from peft_edge.config import RunConfig
from peft_edge.hub.card import shareable
from peft_edge.records import CANCELED, DIVERGED, FAILED, SUCCESS, Record, add_record, read_archive, read_record
from peft_edge.study.jobs import JobAttempt, RunJob
from tests.study.support import FakeJob, done_in, fake_job, record_of


def run_job(folder: Path, **keys: Any) -> RunJob:
    return RunJob("a setting", folder, RunConfig(output_dir=str(folder), **keys))


def leave_record(job: RunJob, status: str, created_at: str = "2020-01-01T00:00:00+00:00") -> None:
    add_record(job.folder, "record", record_of(job.config, status, created_at))


@pytest.mark.parametrize(
    ("status", "is_finished"), [(SUCCESS, True), (DIVERGED, True), (FAILED, False), (CANCELED, False)]
)
def test_failed_and_canceled_runs_are_not_finished(tmp_path: Path, status: str, is_finished: bool) -> None:
    job = run_job(tmp_path / "a")
    assert (job.status, job.is_finished) == ("not run", False)
    leave_record(job, status)
    assert (job.status, job.is_finished) == (status, is_finished)


def test_run_is_named_after_its_folder(tmp_path: Path) -> None:
    job = run_job(tmp_path / "a--seed=0", method="lora-fa")
    assert (job.name, job.log) == ("a--seed=0", tmp_path / "a--seed=0.log")
    assert job.result_name == "lora-fa--a--seed=0"
    assert pickle.loads(pickle.dumps(job)) == job


def test_runs_share_a_source_unless_seed_or_backbone_differ(tmp_path: Path) -> None:
    source = run_job(tmp_path / "a").source
    assert run_job(tmp_path / "b", method="full", adapter={"r": 8}).source == source
    assert run_job(tmp_path / "a", seed=1).source != source
    assert run_job(tmp_path / "a", backbone={"name": "resnet10t"}).source != source


def test_run_in_a_moved_folder_is_finished(tmp_path: Path) -> None:
    leave_record(run_job(tmp_path / "a"), SUCCESS)
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_job(tmp_path / "b").is_finished


def test_record_of_another_configuration_is_ignored(tmp_path: Path) -> None:
    old = run_job(tmp_path / "a", training={"epochs": 3})
    leave_record(old, SUCCESS)
    old.record_failure("killed")
    assert run_job(tmp_path / "a").record is None


def test_newest_record_determines_the_status(tmp_path: Path) -> None:
    job = run_job(tmp_path / "a")
    leave_record(job, CANCELED)
    job.record_failure("killed")
    assert (job.status, job.record.run_info.error_msg) == (FAILED, "killed")
    leave_record(job, DIVERGED, "2999-01-01T00:00:00+00:00")
    assert job.status == DIVERGED


def test_failure_creates_no_folder_and_is_deleted_after_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run_job(tmp_path / "a")
    job.record_failure("killed")
    # A folder with a record and without a configuration would be refused by the next run.
    assert not job.folder.exists()

    monkeypatch.setattr(training, "run", lambda config: leave_record(job, SUCCESS, "2000-01-01T00:00:00+00:00"))
    job.run()
    assert job.status == SUCCESS
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def attempt_at(job: RunJob, tmp_path: Path) -> JobAttempt:
    """Return the attempt of a study that begins now."""
    return JobAttempt(job, job.record, tmp_path / "results")


def result_of(job: RunJob, tmp_path: Path) -> object:
    return read_archive(tmp_path / "results").runs[f"{job.result_name}.json"]


@pytest.fixture
def job(tmp_path: Path) -> FakeJob:
    return fake_job(tmp_path / "runs" / "a")


def test_finished_job_is_copied_to_results_and_not_done_again(job: FakeJob, tmp_path: Path) -> None:
    attempt = attempt_at(job, tmp_path)
    assert not attempt.is_kept
    assert attempt.run()
    assert attempt.is_kept
    assert job.status == SUCCESS
    assert result_of(job, tmp_path) == shareable(job.record)
    assert job.log.read_text() == "this is a\n"

    assert attempt_at(job, tmp_path).run()
    assert done_in(tmp_path / "runs") == ["a"]


def test_results_contain_no_path_of_this_machine(job: FakeJob, tmp_path: Path) -> None:
    attempt_at(job, tmp_path).run()
    assert str(tmp_path) in job.record.to_json()
    (result,) = (tmp_path / "results").iterdir()
    assert str(tmp_path) not in result.read_text()


def test_locked_job_is_skipped(job: FakeJob, tmp_path: Path) -> None:
    attempt = attempt_at(job, tmp_path)
    with FileLock(tmp_path / "runs" / "a.lock"):
        assert not attempt.run()
        assert not replace(attempt, patience_s=0.1).fail("killed")
    assert done_in(tmp_path / "runs") == []
    assert job.record is None
    assert attempt.run()


def test_job_that_another_process_tried_is_left_to_the_next_study(tmp_path: Path) -> None:
    ours, theirs = (attempt_at(fake_job(tmp_path / "runs" / "a", "error"), tmp_path) for _ in range(2))
    assert theirs.run()
    assert theirs.job.status == FAILED
    assert ours.run()
    assert done_in(tmp_path / "runs") == ["a"]

    again = attempt_at(fake_job(tmp_path / "runs" / "a"), tmp_path)
    assert again.run()
    assert done_in(tmp_path / "runs") == ["a", "a"]
    assert again.job.status == SUCCESS
    assert result_of(again.job, tmp_path) == shareable(again.job.record)


def test_failure_without_a_record_gets_one(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "runs" / "a", "error")
    assert attempt_at(job, tmp_path).run()
    record = job.record
    assert (record.train_info.status, record.run_info.experiment_name) == (FAILED, "lora/a")
    assert record.run_info.error_msg.endswith("RuntimeError: a fails\n")
    assert result_of(job, tmp_path) == shareable(record)
    assert job.log.read_text().startswith("this is a\nTraceback")


def test_failure_with_a_record_keeps_it(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "runs" / "a", DIVERGED)
    assert attempt_at(job, tmp_path).run()
    assert job.status == DIVERGED
    assert result_of(job, tmp_path) == shareable(job.record)
    assert attempt_at(job, tmp_path).is_kept


def test_job_of_a_dead_process_has_failed(job: FakeJob, tmp_path: Path) -> None:
    assert attempt_at(job, tmp_path).fail("killed (SIGKILL)")
    assert (job.status, job.record.run_info.error_msg) == (FAILED, "killed (SIGKILL)")
    assert result_of(job, tmp_path) == shareable(job.record)
    assert "SIGKILL" in job.log.read_text()


def test_process_that_dies_after_the_job_keeps_its_record(job: FakeJob, tmp_path: Path) -> None:
    attempt = attempt_at(job, tmp_path)
    add_record(job.folder, "record", record_of(job.config))
    assert attempt.fail("killed")
    assert job.status == SUCCESS
    assert result_of(job, tmp_path) == shareable(job.record)


@pytest.mark.parametrize("found", ["nothing", "an older record", "half a record"])
def test_missing_old_and_damaged_results_are_replaced(job: FakeJob, tmp_path: Path, found: str) -> None:
    assert attempt_at(job, tmp_path).run()
    file = tmp_path / "results" / "lora--a.json"
    if found == "nothing":
        file.unlink()
    elif found == "an older record":
        add_record(tmp_path / "results", "lora--a", record_of(job.config, FAILED))
    else:
        file.write_text(file.read_text()[:100])
    attempt = attempt_at(job, tmp_path)
    assert not attempt.is_kept
    assert attempt.run()
    assert attempt.is_kept
    assert result_of(job, tmp_path) == shareable(job.record)
    assert done_in(tmp_path / "runs") == ["a"]


def test_damaged_record_is_named(job: FakeJob, tmp_path: Path) -> None:
    attempt = attempt_at(job, tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        attempt.run()


def test_run_in_the_folder_of_another_changes_nothing_there(tmp_path: Path) -> None:
    other = RunConfig(output_dir=str(tmp_path / "runs" / "a"), method="head", trackers=[])
    job = RunJob("a", tmp_path / "runs" / "a", other.model_copy(update={"method": "bias"}))
    add_record(job.folder, "record", theirs := record_of(other))
    assert attempt_at(job, tmp_path).run()
    assert read_record(job.folder / "record.json", Record) == theirs
    assert job.status == FAILED
    assert "holds no run: choose another folder" in job.record.run_info.error_msg
    assert result_of(job, tmp_path) == shareable(job.record)
