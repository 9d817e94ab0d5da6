"""Studies in their own processes, with failing and killed jobs and several at once, and their tables."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

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
    read_archive,
)
from peft_edge.study.jobs import Job, RunJob
from peft_edge.study.runner import run_grid, study_table
from tests.study.support import done_in, fake_job, record_of

ROOT = Path(__file__).parents[2]
GRID = """
recipes: [[task.yaml], [lora.yaml, full.yaml]]
grid: {seed: [0, 1]}
"""
TASK = """
backbone: {name: mobilenetv3_small_050}
data: {name: digits, shift: invert, image_size: 16}
source: {epochs: 1, batch_size: 350}
training: {epochs: 2, batch_size: 100, warmup_steps: 0, checkpoint_every_steps: 1}
cpu: true
trackers: []
"""


def start(*code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "\n".join(code)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start_study(grid: Path, output_dir: Path) -> subprocess.Popen[str]:
    options = ["study", "--grid", str(grid), "--output-dir", str(output_dir)]
    return start(
        # A process in the background ignores Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)",
        "from peft_edge.cli import main",
        f"if __name__ == '__main__': main({options})",
    )


def start_fakes(folder: Path, num_jobs: int, seconds: float) -> subprocess.Popen[str]:
    return start(
        "from pathlib import Path",
        "from peft_edge.study.runner import run_grid",
        "from tests.study.support import fake_job",
        f"jobs = [fake_job(Path({str(folder)!r}, str(n)), seconds={seconds}) for n in range({num_jobs})]",
        f"run_grid(jobs, results=Path({str(folder)!r}, 'results'))",
        "assert all(job.is_finished for job in jobs)",
    )


def finish(process: subprocess.Popen[str], returncode: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == returncode, errors
    return output, errors


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def results_in(folder: Path) -> dict[str, Record]:
    return read_archive(folder / "results").runs


@pytest.mark.slow
def test_one_job_of_each_source_is_first_and_failures_stop_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds_and_endings = {"a": (0, SUCCESS), "b": (0, SUCCESS), "c": (1, "error"), "d": (1, DIVERGED)}
    jobs = [fake_job(tmp_path / name, ending, seed=seed) for name, (seed, ending) in seeds_and_endings.items()]
    run_grid(jobs, results=tmp_path / "results")
    assert done_in(tmp_path) == ["a", "c", "b", "d"]
    assert [job.status for job in jobs] == [SUCCESS, SUCCESS, FAILED, DIVERGED]
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in jobs}
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "4/4" in last_line
    assert "failed=1" in last_line


def test_empty_grid_starts_no_process(tmp_path: Path) -> None:
    run_grid([], results=tmp_path / "results")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_killed_job_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    endings = {"a": SUCCESS, "b": "killed", "c": "error", "d": SUCCESS}
    jobs = [fake_job(tmp_path / name, ending) for name, ending in endings.items()]
    run_grid(jobs, results=tmp_path / "results")
    assert [job.status for job in jobs] == [SUCCESS, FAILED, FAILED, SUCCESS]
    assert done_in(tmp_path) == ["a", "b", "c", "d"]
    assert "was killed (SIGKILL)" in jobs[1].record.run_info.error_msg
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in jobs}

    again = [fake_job(tmp_path / name) for name in endings]
    run_grid(again, processes=2, results=tmp_path / "results")
    assert {job.status for job in again} == {SUCCESS}
    assert sorted(done_in(tmp_path)[4:]) == ["b", "c"]
    assert results_in(tmp_path) == {f"lora--{job.name}.json": shareable(job.record) for job in again}
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_damaged_record_stops_the_study_and_its_processes(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path / "a", "damaged"), fake_job(tmp_path / "b", seconds=500)]
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        run_grid(jobs, processes=2, results=tmp_path / "results")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_two_studies_do_each_job_once(tmp_path: Path) -> None:
    studies = [start_fakes(tmp_path, 40, 0.05) for _ in range(2)]
    for study in studies:
        finish(study)
    assert Counter(done_in(tmp_path)) == {str(number): 1 for number in range(40)}
    assert len(results_in(tmp_path)) == 40


@pytest.mark.slow
def test_processes_of_a_killed_study_end(tmp_path: Path) -> None:
    study = start_fakes(tmp_path, 2, 60)
    wait_until(lambda: done_in(tmp_path), study)
    processes = psutil.Process(study.pid).children()
    study.kill()
    study.communicate()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert done_in(tmp_path) == ["0"]
    assert not (tmp_path / "0").exists()


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Write a grid of two methods and two seeds."""
    for name, text in {"grid": GRID, "task": TASK, "lora": "method: lora", "full": "method: full"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path / "grid.yaml"


@pytest.mark.slow
def test_resumed_study_has_the_records_of_an_uninterrupted_one(grid: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finish(start_study(grid, whole))

    killed = start_study(grid, halves)
    wait_until(lambda: results_in_part(halves) and list(halves.glob("*/checkpoints/*/step_*")), killed)
    killed.kill()
    killed.communicate()
    num_done = results_in_part(halves)
    assert 0 < num_done < 4
    stopped = {file: file.stat().st_mtime_ns for file in (halves / "results").iterdir()}

    output, _ = finish(start_study(grid, halves))
    assert output.splitlines()[1].split()[:3] == ["task,", "lora", "2"]
    assert {file: file.stat().st_mtime_ns for file in stopped} == stopped
    expected, found = (
        {name: reproducible(record.model_dump()) for name, record in results_in(folder).items()}
        for folder in (whole, halves)
    )
    assert len(expected) == 4
    assert found == expected
    record = results_in(halves)["lora--task--lora--seed=0.json"]
    assert record.train_info.changes
    assert record.profile


@pytest.mark.slow
def test_interrupted_study_prints_one_line(grid: Path, tmp_path: Path) -> None:
    study = start_study(grid, tmp_path / "runs")
    wait_until(lambda: list((tmp_path / "runs").glob("*.log")), study)
    # A terminal interrupts every process.
    os.killpg(study.pid, signal.SIGINT)
    _, errors = finish(study, 130)
    assert errors.splitlines()[-1] == "stopped: finished results are kept"
    assert "Traceback" not in errors
    assert not list((tmp_path / "runs").glob("*/record.json"))


def results_in_part(folder: Path) -> int:
    return len(list((folder / "results").glob("*.json")))


def reproducible(value: Any) -> Any:
    """Drop what differs between equal runs: dates, times, folders and the memory of processes."""
    if isinstance(value, dict):
        return {key: reproducible(entry) for key, entry in value.items() if not is_volatile(key)}
    # PEFT keeps names of layers in a set, whose order varies.
    is_set = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(value) if is_set else list(map(reproducible, value)) if isinstance(value, list) else value


def is_volatile(key: str) -> bool:
    folders_and_figures = ("created_at", "output_dir", "cache_dir", "base_model_name_or_path")
    return key.endswith(("_s", "_time", " time", "peak_rss_bytes", "process_peak_bytes")) or key in folders_and_figures


@dataclass(frozen=True)
class KnownRun(RunJob):
    """A run with a given record."""

    known: Record | None

    @property
    def record(self) -> Record | None:
        return self.known


@dataclass(frozen=True)
class KnownCost(Job):
    """An analysis with a given record."""

    known: CostRecord | None

    @property
    def result_name(self) -> str:
        return self.name

    @property
    def record(self) -> CostRecord | None:
        return self.known

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
        record.train_info.metrics = [{"test accuracy": accuracy, "source test accuracy": 0.5, "retention": 0.25}]
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
        "runs", "accuracy", "source accuracy", "retained", "trained parameters", "saved bytes", "training seconds",
        "training TFLOP", "tensors MiB", "process MiB",
    ]  # fmt: skip
    error = statistics.stdev(accuracies) / 3**0.5
    spread = f"{statistics.mean(accuracies):.3f} ± {error:.3f}"
    assert row == ["task, lora", "3", spread, "0.500", "0.250", "-", "12,345", "-", "-", "-", "-"]


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
