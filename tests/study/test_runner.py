"""Studies in their own processes, with failing and killed jobs, and their tables."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from peft_edge.cli import main
from peft_edge.config import RunConfig
from peft_edge.hub.card import shareable
from peft_edge.records import (
    DIVERGED,
    FAILED,
    SUCCESS,
    CostRecord,
    Record,
    StepProfile,
    TrainingCosts,
    add_record,
    read_archive,
)
from peft_edge.study.grid import read_grid
from peft_edge.study.jobs import Job, RunJob
from peft_edge.study.runner import run_grid, study_table
from tests.processes import start_process
from tests.study.support import done_in, fake_job, record_of, reproducible, small_grid


def start_study(grid: Path, output_dir: Path) -> BaseProcess:
    options = ["study", "--grid", str(grid), "--output-dir", str(output_dir)]
    return start_process(_study, options, log=output_dir.with_suffix(".log"))


def _study(options: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores Ctrl-C
    main(options)


def _fake_jobs(folder: Path, num_jobs: int, seconds: float) -> None:
    jobs = [fake_job(folder / str(number), seconds=seconds) for number in range(num_jobs)]
    run_grid(jobs, results=folder / "results")


def wait_until(condition: Callable[[], Any], process: BaseProcess) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def results_in(folder: Path) -> dict[str, Record]:
    return read_archive(folder / "results").runs


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_one_job_of_each_source_is_first_and_failures_stop_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds_and_endings = {"a": (0, SUCCESS), "b": (0, SUCCESS), "c": (1, "error"), "d": (1, DIVERGED)}
    jobs = [fake_job(tmp_path / name, ending, seed=seed) for name, (seed, ending) in seeds_and_endings.items()]
    run_grid(jobs, results=tmp_path / "results")
    assert done_in(tmp_path) == ["a", "c", "b", "d"]
    assert [job.status for job in jobs] == [SUCCESS, SUCCESS, FAILED, DIVERGED]
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in jobs}
    output = capsys.readouterr().err
    last_line = output.splitlines()[-1]
    assert f"output of the first job: {tmp_path / 'a.log'}" in output
    assert "4/4" in last_line
    assert "failed=1" in last_line


def test_finished_runs_are_not_repeated_if_the_grid_has_more_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run_nothing(jobs: list[Job], processes: int) -> Iterator[tuple[Job, str | None]]:
        asked.append([job.name for job in jobs])
        yield from ()

    monkeypatch.setattr("peft_edge.study.runner._run_in_pool", run_nothing)
    (tmp_path / "task.yaml").write_text("data: {name: digits, shift: invert}\n")
    grid, out = tmp_path / "grid.yaml", tmp_path / "runs"

    def jobs_of(seeds: list[int]) -> list[Job]:
        grid.write_text(f"recipes: [[task.yaml]]\ngrid: {{seed: {seeds}}}\n")
        return read_grid(grid, out)

    (job,) = jobs_of([0])
    record = record_of(job.config)
    add_record(job.folder, "record", record)
    job.log.write_text("its output")
    run_grid([job], results=out / "results")
    assert [file.name for file in (out / "results").iterdir()] == ["lora--task.json"]

    first, second = jobs_of([0, 1])
    run_grid([first, second], results=out / "results")

    assert asked == [[], [second.name]]
    assert (first.record, first.log.read_text()) == (record, "its output")
    assert not job.folder.exists()
    assert [file.name for file in (out / "results").iterdir()] == ["lora--task--seed=0.json"]


def test_empty_grid_starts_no_process(tmp_path: Path) -> None:
    run_grid([], results=tmp_path / "results")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_killed_job_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    endings = {"a": SUCCESS, "b": "killed", "c": "memory", "d": SUCCESS}
    jobs = [fake_job(tmp_path / name, ending) for name, ending in endings.items()]
    run_grid(jobs, results=tmp_path / "results")
    assert [job.status for job in jobs] == [SUCCESS, FAILED, FAILED, SUCCESS]
    assert done_in(tmp_path) == ["a", "b", "c", "d"]
    assert "was killed (SIGKILL)" in jobs[1].record.run_info.error_msg
    assert "SIGKILL" in jobs[1].log.read_text()
    assert jobs[2].record.run_info.error_msg.endswith("MemoryError\n")
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in jobs}

    again = [fake_job(tmp_path / name) for name in endings]
    run_grid(again, processes=2, results=tmp_path / "results")
    assert {job.status for job in again} == {SUCCESS}
    assert sorted(done_in(tmp_path)[4:]) == ["b", "c"]
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in again}
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_damaged_record_stops_the_study_and_its_processes(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path / "a", "damaged"), fake_job(tmp_path / "b", seconds=500)]
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        run_grid(jobs, processes=2, results=tmp_path / "results")
    assert multiprocessing.active_children() == []


def test_second_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".study.lock"),
        pytest.raises(ValueError, match=r"another study is working in .*: wait for its end"),
    ):
        run_grid([fake_job(tmp_path / "a")], results=tmp_path / "results")
    assert done_in(tmp_path) == []


@pytest.mark.parametrize("found", ["nothing", "an older record", "half a record"])
def test_missing_old_and_damaged_copies_are_replaced(tmp_path: Path, found: str) -> None:
    job = fake_job(tmp_path / "runs" / "a")
    add_record(job.folder, "record", record_of(job.config))
    copy = tmp_path / "results" / "lora--a.json"
    if found == "an older record":
        add_record(copy.parent, "lora--a", record_of(job.config, FAILED))
    elif found == "half a record":
        copy.parent.mkdir()
        copy.write_text(job.record.to_json()[:100])
    run_grid([job], results=copy.parent)
    assert results_in(tmp_path) == {"lora--a.json": shareable(job.record)}
    assert str(tmp_path) in job.record.to_json()
    assert str(tmp_path) not in copy.read_text()
    assert done_in(tmp_path / "runs") == []


def test_copy_of_a_newer_version_is_not_replaced(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "runs" / "a")
    add_record(job.folder, "record", record_of(job.config))
    copy = add_record(tmp_path / "results", "lora--a", record_of(job.config))
    newer = copy.read_text().replace("{", '{"added_in_a_newer_version": 1, ', 1)
    copy.write_text(newer)
    with pytest.raises(ValueError, match="a newer one has written it: upgrade"):
        run_grid([job], results=copy.parent)
    assert copy.read_text() == newer


def finished_run(folder: Path, epochs: int, status: str = SUCCESS) -> RunJob:
    config = RunConfig(output_dir=str(folder), data={"name": f"{folder}/photos"}, training={"epochs": epochs})
    job = RunJob("a", folder, config)
    add_record(folder, "record", record_of(config, status))
    return job


def test_results_of_another_study_are_not_replaced(tmp_path: Path) -> None:
    results = tmp_path / "shared"
    run_grid(
        [finished_run(tmp_path / "first" / "a", 1), finished_run(tmp_path / "first" / "b", 1)],
        results=results,
    )
    before = {file: file.read_bytes() for file in results.iterdir()}
    second = [finished_run(tmp_path / "second" / name, epochs) for name, epochs in (("a", 2), ("b", 1), ("c", 2))]
    with pytest.raises(ValueError, match=r"shared contains finished runs .* or delete lora--a\.json there"):
        run_grid(second, results=results)
    assert {file: file.read_bytes() for file in results.iterdir()} == before
    run_grid(second[1:], results=results)  # b has the same configuration in both studies
    assert sorted(file.name for file in results.iterdir()) == ["lora--a.json", "lora--b.json", "lora--c.json"]
    run_grid(second[:1], results=tmp_path / "second" / "results")


def test_records_of_failed_runs_and_of_own_earlier_runs_are_replaced(tmp_path: Path) -> None:
    job, own, shared = finished_run(tmp_path / "runs" / "a", 1), tmp_path / "runs" / "results", tmp_path / "shared"
    other = job.config.model_copy(update={"seed": 1})
    add_record(own, job.result_name, shareable(record_of(other)))
    add_record(shared, job.result_name, shareable(record_of(other, FAILED)))
    for results in (own, shared):
        run_grid([job], results=results)
        assert read_archive(results).runs == {"lora--a.json": shareable(job.record)}


def test_renamed_run_leaves_the_record_of_another_study(tmp_path: Path) -> None:
    job, results = finished_run(tmp_path / "runs" / "a", 1), tmp_path / "shared"
    other = shareable(record_of(job.config.model_copy(update={"seed": 1}), created_at="2020-01-01"))
    add_record(results, job.result_name, other)
    renamed = replace(job, folder=job.folder.with_name("a--seed=0"))
    run_grid([renamed], results=results)
    found = read_archive(results).runs
    assert found == {"lora--a.json": other, "lora--a--seed=0.json": shareable(renamed.record)}


@pytest.mark.slow
def test_processes_of_a_killed_study_end(tmp_path: Path) -> None:
    study = start_process(_fake_jobs, tmp_path, 2, 60, log=tmp_path / "study.log")
    wait_until(lambda: done_in(tmp_path), study)
    processes = psutil.Process(study.pid).children()
    study.kill()
    study.join()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert done_in(tmp_path) == ["0"]
    assert not (tmp_path / "0").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_resumed_study_has_the_records_of_runs_without_a_study(tmp_path: Path) -> None:
    grid = small_grid(tmp_path)
    killed = start_study(grid, tmp_path / "study")
    found = ("results/*.json", "*/checkpoints/*/step_0000000[4-9]")
    wait_until(lambda: all(list(tmp_path.glob(f"study/{pattern}")) for pattern in found), killed)
    processes = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.join()
    psutil.wait_procs(processes, timeout=60)  # until then, the workers hold the locks of their folders
    stopped = {file: file.stat().st_mtime_ns for file in (tmp_path / "study/results").iterdir()}
    assert len(stopped) == 1

    jobs = read_grid(grid, tmp_path / "study")
    run_grid(jobs, results=tmp_path / "study/results")
    assert {file: file.stat().st_mtime_ns for file in stopped} == stopped
    for job in jobs:
        alone = job.moved_to(tmp_path / "alone")
        alone.run()
        assert reproducible(job.record.model_dump()) == reproducible(alone.record.model_dump())
        assert job.record.train_info.changes
        assert job.record.profile
    expected = {f"{job.result_name}.json": shareable(job.record) for job in jobs}
    assert results_in(tmp_path / "study") == expected
    assert len(expected) == 2


@pytest.mark.slow
def test_interrupted_study_prints_one_line(tmp_path: Path) -> None:
    study = start_study(small_grid(tmp_path), tmp_path / "runs")
    wait_until(lambda: list((tmp_path / "runs").glob("*.log")), study)
    # A terminal interrupts every process.
    os.killpg(study.pid, signal.SIGINT)
    study.join(300)
    assert study.exitcode == 130
    said = (tmp_path / "runs.log").read_text()
    assert said.splitlines()[-1] == "stopped: finished results are kept"
    assert "Traceback" not in said
    assert not list((tmp_path / "runs").glob("*/record.json"))


@dataclass(frozen=True)
class KnownRun(RunJob):
    """A job that is a run and whose record the test chooses."""

    known: Record | None

    @property
    def record(self) -> Record | None:
        return self.known


@dataclass(frozen=True)
class KnownCost(Job):
    """A job that is a cost analysis and whose record the test chooses."""

    known: CostRecord | None

    @property
    def result_name(self) -> str:
        return self.name

    @property
    def record(self) -> CostRecord | None:
        return self.known

    def check_folder(self) -> None:
        raise NotImplementedError

    def train_source(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def record_failure(self, reason: str) -> None:
        raise NotImplementedError


def run(setting: str, status: str | None, accuracy: float = 0.0, train_time: float | None = None) -> KnownRun:
    config = RunConfig(output_dir="a")
    if status is None:
        return KnownRun(setting, Path("a"), config, None)
    record = record_of(config, status)
    if status == SUCCESS:
        record.train_info.metrics = [
            {
                "test accuracy": accuracy,
                "test accuracy without update": 0.375,
                "source test accuracy": 0.5,
                "retention": 0.25,
            }
        ]
        record.train_info.file_size = 12345
        record.train_info.train_time = train_time
    return KnownRun(setting, Path("a"), config, record)


def cost(setting: str, profile: StepProfile | None) -> KnownCost:
    record = profile and CostRecord(
        created_at="",
        network="net",
        kind="standard",
        method="full",
        setting={},
        num_total_params=1,
        profile=profile,
        package_info={},
    )
    return KnownCost(setting, Path("a"), record)


def lines_of(jobs: list[Job]) -> list[list[str]]:
    return [line.split("  ") for line in study_table(jobs).splitlines()]


def cells_of(line: list[str]) -> list[str]:
    return [cell.strip() for cell in line if cell.strip()]


def test_runs_are_averaged_over_seeds() -> None:
    accuracies = [0.7, 0.75, 0.83]
    title, row = map(cells_of, lines_of([run("task, lora", SUCCESS, accuracy) for accuracy in accuracies]))
    assert title == [
        "runs", "accuracy", "no update", "source accuracy", "retained", "trained parameters", "saved bytes",
        "training seconds",
        "training TFLOP", "tensors MiB", "process MiB",
    ]  # fmt: skip
    error = statistics.stdev(accuracies) / 3**0.5
    spread = f"{statistics.mean(accuracies):.3f} ± {error:.3f}"
    assert row == ["task, lora", "3", spread, "0.375", "0.500", "0.250", "-", "12,345", "-", "-", "-", "-"]


def test_costs_of_a_run_are_those_of_the_whole_training() -> None:
    job = run("a", SUCCESS, 0.9, train_time=1.1)
    assert cells_of(lines_of([job])[1])[-4:] == ["1.1", "-", "-", "-"]
    costs = TrainingCosts(
        total_s=19.9, step_s=1.1, loading_s=0.0, storing_s=18.8, statistics_s=0.0, validation_s=5.0,
        flops=1_230_000_000_000, process_peak_bytes=1000 * 2**20,
    )  # fmt: skip
    assert job.known is not None
    job.known.train_info.costs = costs
    job.known.profile = [StepProfile(process_index=0, scope="step", memory_peak_bytes=3 * 2**18)]
    assert cells_of(lines_of([job])[1])[-4:] == ["19.9", "1.23", "0.8", "1,000"]


def test_other_statuses_are_listed_and_not_averaged() -> None:
    runs = [run("a", SUCCESS, 0.9), run("b", DIVERGED), run("a", FAILED), run("a", None)]
    first, second = map(cells_of, lines_of(runs)[1:])
    assert first[:3] == ["a", "1, failed, not run", "0.900"]
    assert second[:3] == ["b", "0, diverged", "-"]


def test_analyses_have_a_second_table() -> None:
    profile = StepProfile(
        process_index=0,
        scope="step",
        memory_peak_bytes=3 * 2**20,
        flops_forward=1_234_000_000,
        flops_backward=2_500_000_000,
    )
    table = lines_of([cost("net, full", profile), run("a", None), cost("net, lora", None)])
    assert [cells_of(line) for line in table[3:]] == [
        ["analyses", "peak MiB", "forward GFLOP", "backward GFLOP"],
        ["net, full", "1", "3.0", "1.23", "2.50"],
        ["net, lora", "0, not run", "-", "-", "-"],
    ]
    assert study_table([]) == ""
