"""Studies in processes of their own: with failing cells, killed ones, and several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from peft_edge.archive import read_archive
from peft_edge.hub.sharing import shareable
from peft_edge.records import DIVERGED, FAILED, SUCCESS, Record
from peft_edge.study.runner import run_grid
from tests.study.support import done_in, fake_cell

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
        # What is started in the background of a script ignores Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)",
        "from peft_edge.cli import main",
        f"if __name__ == '__main__': main({options})",
    )


def start_fakes(folder: Path, num_cells: int, seconds: float) -> subprocess.Popen[str]:
    return start(
        "from pathlib import Path",
        "from peft_edge.study.runner import run_grid",
        "from tests.study.support import fake_cell",
        f"cells = [fake_cell(Path({str(folder)!r}, str(n)), seconds={seconds}) for n in range({num_cells})]",
        f"run_grid(cells, results=Path({str(folder)!r}, 'results'))",
        "assert all(cell.is_finished for cell in cells)",
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
def test_one_cell_of_each_source_is_done_first_and_a_failure_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds_and_endings = {"a": (0, SUCCESS), "b": (0, SUCCESS), "c": (1, "error"), "d": (1, DIVERGED)}
    cells = [fake_cell(tmp_path / name, ending, seed=seed) for name, (seed, ending) in seeds_and_endings.items()]
    run_grid(cells, results=tmp_path / "results")
    assert done_in(tmp_path) == ["a", "c", "b", "d"]
    assert [cell.status for cell in cells] == [SUCCESS, SUCCESS, FAILED, DIVERGED]
    assert results_in(tmp_path) == {f"lora--{cell.name}.json": shareable(cell.record) for cell in cells}
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "4/4" in last_line
    assert "failed=1" in last_line


def test_nothing_to_do_starts_no_process(tmp_path: Path) -> None:
    run_grid([], results=tmp_path / "results")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_is_killed_stops_no_other_and_its_cell_is_tried_again(tmp_path: Path) -> None:
    endings = {"a": SUCCESS, "b": "killed", "c": "error", "d": SUCCESS}
    cells = [fake_cell(tmp_path / name, ending) for name, ending in endings.items()]
    run_grid(cells, results=tmp_path / "results")
    assert [cell.status for cell in cells] == [SUCCESS, FAILED, FAILED, SUCCESS]
    assert done_in(tmp_path) == ["a", "b", "c", "d"]
    assert "was killed (SIGKILL)" in cells[1].record.run_info.error_msg
    assert results_in(tmp_path) == {f"lora--{cell.name}.json": shareable(cell.record) for cell in cells}

    again = [fake_cell(tmp_path / name) for name in endings]
    run_grid(again, jobs=2, results=tmp_path / "results")
    assert {cell.status for cell in again} == {SUCCESS}
    assert sorted(done_in(tmp_path)[4:]) == ["b", "c"]
    assert results_in(tmp_path) == {f"lora--{cell.name}.json": shareable(cell.record) for cell in again}
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_study_that_cannot_go_on_says_why_and_ends_its_processes(tmp_path: Path) -> None:
    cells = [fake_cell(tmp_path / "a", "damaged"), fake_cell(tmp_path / "b", seconds=500)]
    with pytest.raises(ValueError, match=r"a/record\.json is damaged"):
        run_grid(cells, jobs=2, results=tmp_path / "results")
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_two_studies_share_a_folder(tmp_path: Path) -> None:
    studies = [start_fakes(tmp_path, 40, 0.05) for _ in range(2)]
    for study in studies:
        finish(study)
    assert Counter(done_in(tmp_path)) == {str(number): 1 for number in range(40)}
    assert len(results_in(tmp_path)) == 40


@pytest.mark.slow
def test_a_study_that_is_killed_takes_its_processes_with_it(tmp_path: Path) -> None:
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
    """Two methods and two seeds."""
    for name, text in {"grid": GRID, "task": TASK, "lora": "method: lora", "full": "method: full"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path / "grid.yaml"


@pytest.mark.slow
def test_a_killed_study_ends_with_the_records_of_one_that_was_not(grid: Path, tmp_path: Path) -> None:
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
        {name: lasting(asdict(record)) for name, record in results_in(folder).items()} for folder in (whole, halves)
    )
    assert len(expected) == 4
    assert found == expected
    record = results_in(halves)["lora--task--lora--seed=0.json"]
    assert record.train_info.changes
    assert record.profile


@pytest.mark.slow
def test_an_interrupted_study_says_so_in_one_line(grid: Path, tmp_path: Path) -> None:
    study = start_study(grid, tmp_path / "runs")
    wait_until(lambda: list((tmp_path / "runs").glob("*.log")), study)
    # As a terminal does, which interrupts every process.
    os.killpg(study.pid, signal.SIGINT)
    _, errors = finish(study, 130)
    assert errors.splitlines()[-1] == "stopped: what was finished is kept"
    assert "Traceback" not in errors
    assert not list((tmp_path / "runs").glob("*/record.json"))


def results_in_part(folder: Path) -> int:
    return len(list((folder / "results").glob("*.json")))


def lasting(value: Any) -> Any:
    """What a second run of the same must give again: all but dates, times, folders and the memory of processes."""
    if isinstance(value, dict):
        return {key: lasting(entry) for key, entry in value.items() if not passes(key)}
    # PEFT keeps the names of layers in a set.
    is_set = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(value) if is_set else list(map(lasting, value)) if isinstance(value, list) else value


def passes(key: str) -> bool:
    folders_and_figures = ("created_at", "output_dir", "cache_dir", "base_model_name_or_path", "peak_rss_bytes")
    return key.endswith(("_s", "_time", " time")) or key in folders_and_figures
