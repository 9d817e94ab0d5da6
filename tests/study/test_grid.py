"""Grid files: combinations, names, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.study.analyses import CostJob
from peft_edge.study.grid import read_grid
from peft_edge.study.jobs import RunJob

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Write the file of a grid of two methods and two seeds, and return its path."""
    (tmp_path / "task.yaml").write_text("data: {name: digits, shift: invert}\n")
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "head.yaml").write_text("method: head\n")
    (tmp_path / "methods" / "full.yaml").write_text("method: full\n")
    file = tmp_path / "grid.yaml"
    file.write_text("recipes:\n  - [task.yaml]\n  - [methods/*.yaml]\ngrid:\n  seed: [0, 1]\n")
    return file


def test_every_combination_is_a_job(grid: Path, tmp_path: Path) -> None:
    jobs = read_grid(grid, tmp_path / "runs")
    assert [job.setting for job in jobs] == ["task, full", "task, full", "task, head", "task, head"]
    assert [job.name for job in jobs] == [
        "task--full--seed=0",
        "task--full--seed=1",
        "task--head--seed=0",
        "task--head--seed=1",
    ]
    config = jobs[3].config
    assert (config.method, config.seed, config.data.shift) == ("head", 1, "invert")
    assert config.output_dir == str(jobs[3].folder) == str(tmp_path / "runs" / "task--head--seed=1")
    assert {job.config.cache_dir for job in jobs} == {str(tmp_path / "runs" / "cache")}


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_folders_that_the_study_chooses_are_refused(grid: Path, tmp_path: Path, key: str) -> None:
    grid.write_text(f"recipes: [[task.yaml]]\ngrid: {{{key}: [elsewhere]}}\n")
    with pytest.raises(ValueError, match=rf"leave {key} out"):
        read_grid(grid, tmp_path / "runs")


def test_grid_for_own_photographs_has_a_learning_rate_for_each_method(tmp_path: Path) -> None:
    jobs = read_grid(ROOT / "configs/study/image_folder.yaml", tmp_path)
    rates = {job.config.method: job.config.training.learning_rate for job in jobs}
    assert rates == {"none": [1e-3, 3e-3], "lora": [1e-3, 3e-3], "full": [3e-4, 1e-3]}
    assert {job.config.data.shift for job in jobs} == {"path/to/photos-of-the-new-camera"}


def test_job_names_have_the_varied_values_and_no_slash(grid: Path, tmp_path: Path) -> None:
    grid.write_text(
        "recipes: [[task.yaml]]\n"
        "grid: {backbone.name: [timm/a, timm/b], training.learning_rate: [[1e-2, 3e-3]], norm: [stats], seed: [0, 1]}\n"
    )
    jobs = read_grid(grid, tmp_path / "runs")
    assert jobs[3].setting == "task, backbone.name=timm/b"
    assert jobs[3].folder == tmp_path / "runs" / "task--backbone.name=timm_b--seed=1"
    assert jobs[3].config.training.learning_rate == [1e-2, 3e-3]


def test_grid_may_have_blocks_of_runs_and_of_analyses(grid: Path, tmp_path: Path) -> None:
    grid.write_text(
        "- recipes: [[task.yaml], [methods/head.yaml]]\n"
        "- recipes: [[task.yaml], [methods/full.yaml]]\n  grid: {seed: [0, 1]}\n"
        "- networks: [resnet18]\n  grid: {method: [full, lora]}\n"
    )
    jobs = read_grid(grid, tmp_path / "runs")
    assert [type(job) for job in jobs] == [RunJob] * 3 + [CostJob] * 2
    assert [job.name for job in jobs[:3]] == ["task--head", "task--full--seed=0", "task--full--seed=1"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid(path: Path, tmp_path: Path) -> None:
    jobs = read_grid(path, tmp_path)
    assert len({job.result_name for job in jobs}) == len(jobs) > 0


def test_all_invalid_configurations_are_named(grid: Path, tmp_path: Path) -> None:
    grid.write_text(
        "- recipes:\n  - [task.yaml]\n  - [methods/*.yaml]\n  grid:\n    adapter.r: [4, 0]\n"
        "- recipes: [[nothing.yaml]]\n"
        "- networks: [resnet18]\n  grid: {method: [full], lora_rank: [0]}\n"
    )
    with pytest.raises(
        ValueError,
        match=r"2 runs cannot be configured(?s:.*)full, adapter\.r=0(?s:.*)head, adapter\.r=0"
        r"(?s:.*)no file matches nothing\.yaml(?s:.*)lora_rank",
    ):
        read_grid(grid, tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected `recipes`, a list of lists of files"),
        ("[]", "expected `recipes`"),
        ("{", "expected `recipes`"),
        ("recipes: 3", "expected `recipes`"),
        ("recipes: [task.yaml]", "expected `recipes`"),
        ("recipes: [[nothing*.yaml]]", "no file matches nothing"),
        ("recipes: [[/nothing/at/all.yaml]]", "no file matches /nothing"),
        ("recipes: [[task.yaml]]\ngird: {seed: [1]}", "gird"),
        ("recipes: [[task.yaml]]\ngrid: {seed: []}", "grid.seed"),
        ("recipes: [[task.yaml]]\ngrid: {method: lora}", "grid.method"),
        ("recipes: [[task.yaml]]\ngrid: {seed: [0, 0]}", "each value once: task--seed=0 comes more than once"),
        ("- recipes: [[task.yaml]]\n- recipes: [[task.yaml]]", "task comes more than once"),
        ("recipes: [[task.yaml]]\ngrid: [1]", "expected `recipes`"),
        ("recipes: [[task.yaml]]\nnetworks: [resnet18]\ngrid: {method: [full]}", "recipes"),
    ],
)
def test_invalid_grid_file_is_refused(grid: Path, tmp_path: Path, text: str, message: str) -> None:
    grid.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(grid, tmp_path)
