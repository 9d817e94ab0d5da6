from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from peft_edge.records import DIVERGED, SUCCESS
from peft_edge.study import Cell, read_grid, run_grid, study_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two methods and two seeds; one of the methods cannot be trained."""
    (tmp_path / "task.yaml").write_text(
        "backbone: {name: mobilenetv3_small_050}\ndata: {name: digits, shift: invert, image_size: 16}\n"
        "source: {epochs: 1, batch_size: 350}\ncpu: true\ntrackers: []\nprofiling: {every_n_steps: 0}\n"
        "training: {epochs: 1, batch_size: 100, warmup_steps: 0, checkpoint_every_steps: 1}\n"
    )
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "head.yaml").write_text("method: head\n")
    (tmp_path / "methods" / "full.yaml").write_text("method: full\ntraining: {learning_rate: 1e30}\n")
    file = tmp_path / "grid.yaml"
    file.write_text("recipes:\n  - [task.yaml]\n  - [methods/*.yaml]\ngrid:\n  seed: [0, 1]\n")
    return file


def by_name(cells: list[Cell]) -> dict[str, Cell]:
    return {Path(cell.config.output_dir).name: cell for cell in cells}


@pytest.mark.slow
def test_every_combination_is_run_once_and_a_failure_stops_no_other(grid: Path, tmp_path: Path) -> None:
    cells = read_grid(grid, tmp_path / "runs")
    assert [cell.setting for cell in cells] == ["task, full", "task, full", "task, head", "task, head"]
    run_grid(cells)
    found = by_name(cells)
    assert list(found) == ["task--full--seed=0", "task--full--seed=1", "task--head--seed=0", "task--head--seed=1"]
    statuses = [cell.record.train_info.status for cell in cells]
    assert statuses == [DIVERGED, DIVERGED, SUCCESS, SUCCESS]
    assert "diverged" in (tmp_path / "runs" / "task--full--seed=0.log").read_text()

    created = cells[2].record.run_info.created_at
    run_grid(cells[2:])
    assert cells[2].record.run_info.created_at == created

    # A run of an older recipe is not this one.
    (tmp_path / "methods" / "head.yaml").write_text("method: head\ntraining: {learning_rate: 5e-3}\n")
    changed = read_grid(grid, tmp_path / "runs")
    assert [cell.record for cell in changed[2:]] == [None, None]

    head, full = (line.split() for line in reversed(study_table(cells).splitlines()[1:]))
    assert full[:5] == ["task,", "full", "0,", "diverged", "-"]
    accuracies = [cell.record.train_info.metrics[-1]["test accuracy"] for cell in cells[2:]]
    assert head[:3] == ["task,", "head", "2"]
    assert head[3:6] == [f"{statistics.mean(accuracies):.3f}", "±", f"{statistics.stdev(accuracies):.3f}"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid(path: Path, tmp_path: Path) -> None:
    cells = read_grid(path, tmp_path)
    assert len(by_name(cells)) == len(cells) > 0


def test_all_wrong_configurations_are_named(grid: Path, tmp_path: Path) -> None:
    grid.write_text("recipes:\n  - [task.yaml]\n  - [methods/*.yaml]\ngrid:\n  adapter.r: [4, 0]\n")
    with pytest.raises(
        ValueError, match=r"2 runs cannot be configured(?s:.*)full, adapter\.r=0(?s:.*)head, adapter\.r=0"
    ):
        read_grid(grid, tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected `recipes`, a list of lists of files"),
        ("recipes: 3", "expected `recipes`"),
        ("recipes: [task.yaml]", "expected `recipes`"),
        ("recipes: [[nothing*.yaml]]", "no file is found for nothing"),
        ("recipes: [[/nothing/at/all.yaml]]", "no file is found for /nothing"),
        ("recipes: [[task.yaml]]\ngird: {seed: [1]}", "gird"),
        ("recipes: [[task.yaml]]\ngrid: {seed: []}", "grid.seed"),
        ("recipes: [[task.yaml]]\ngrid: {method: lora}", "grid.method"),
        ("recipes: [[task.yaml]]\ngrid: {seed: [0, 0]}", "task--seed=0 comes twice"),
        ("recipes: [[task.yaml]]\ngrid: [1]", "expected `recipes`"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(grid: Path, tmp_path: Path, text: str, message: str) -> None:
    grid.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(grid, tmp_path)
