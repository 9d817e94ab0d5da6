"""Jobs, their records and their failures."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from peft_edge import training
from peft_edge.config import RunConfig, to_yaml
from peft_edge.records import CANCELED, DIVERGED, FAILED, SUCCESS, Record, add_record, read_record
from peft_edge.study.jobs import RunJob
from tests.study.support import fake_job, record_of


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
    assert run_job(tmp_path / "a", num_threads=2).source != source


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


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_output_of_a_job_is_in_its_log(runs: Path) -> None:
    job = fake_job(runs / "a")
    job.attempt()
    assert job.status == SUCCESS
    assert job.log.read_text() == "this is a\n"


@pytest.mark.parametrize("ending", ["error", "exit"])
def test_failure_without_a_record_gets_one(runs: Path, ending: str) -> None:
    job = fake_job(runs / "a", ending)
    job.attempt()
    record = job.record
    assert (record.train_info.status, record.run_info.experiment_name) == (FAILED, "lora/a")
    expected = "RuntimeError: a fails\n" if ending == "error" else "SystemExit: 143\n"
    assert record.run_info.error_msg.endswith(expected)
    assert job.log.read_text().startswith("this is a\nTraceback")
    assert not job.folder.exists()


def test_failure_with_a_record_keeps_it(runs: Path) -> None:
    job = fake_job(runs / "a", DIVERGED)
    job.attempt()
    assert job.status == DIVERGED
    assert not job.failed_folder.exists()
    assert "a fails" in job.log.read_text()


def test_damaged_record_is_named(runs: Path) -> None:
    job = fake_job(runs / "a")
    job.folder.mkdir()
    (job.folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        job.attempt()


def test_run_in_the_folder_of_another_changes_nothing_there(runs: Path) -> None:
    other = RunConfig(output_dir=str(runs / "a"), method="head", trackers=[])
    job = RunJob("a", runs / "a", other.model_copy(update={"method": "bias"}))
    add_record(job.folder, "record", theirs := record_of(other))
    with pytest.raises(ValueError, match="holds no run: choose another folder"):
        job.check_folder()
    job.attempt()
    assert read_record(job.folder / "record.json", Record) == theirs
    assert job.status == FAILED
    assert "holds no run: choose another folder" in job.record.run_info.error_msg


@pytest.mark.parametrize("method", ["none", "head"])
def test_changed_configuration_in_the_folder_of_a_finished_run_is_refused(runs: Path, method: str) -> None:
    keys = {"method": method, "data": {"shift": "blend"}, "trackers": [], "cpu": True}
    leave_record(old := run_job(runs / "a", **keys), SUCCESS)
    (old.folder / "config.yaml").write_text(to_yaml(old.config))
    job = run_job(runs / "a", **keys, seed=1)
    job.attempt()
    assert job.status == FAILED
    assert "holds another run" in job.record.run_info.error_msg
    assert old.is_finished


def test_moved_job_has_its_folder_and_its_cache_elsewhere(tmp_path: Path) -> None:
    job = run_job(tmp_path / "a", method="head")
    moved = job.moved_to(tmp_path / "elsewhere")
    assert moved.folder == tmp_path / "elsewhere" / "a"
    assert (moved.config.output_dir, moved.config.cache_dir) == (str(moved.folder), str(tmp_path / "elsewhere/cache"))
    assert (moved.name, moved.result_name, moved.source) == (job.name, job.result_name, job.source)
