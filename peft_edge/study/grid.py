"""The file that says what a study does: every combination of recipes or networks, and of values."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from peft_edge.config import ConfigError, Section, load_config
from peft_edge.files import matching_files
from peft_edge.study.costs import CostGrid, cost_jobs
from peft_edge.study.jobs import Job, RunJob


class RunGrid(Section):
    """The block of a grid file that asks for runs."""

    recipes: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    """Configuration files, with wildcards: a run takes one of each list, a later one over an earlier one."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """Values to try for each of some keys."""


def read_grid(file: Path, output_dir: Path) -> list[Job]:
    """Reads a grid, and checks everything in it.

    Args:
        file: YAML with the keys of `RunGrid` or `CostGrid`, or a list of such blocks; its files are relative to this
            one. Every combination is a job.
        output_dir: Each job gets a folder in it.

    Raises:
        ValueError: The file is no grid, a pattern finds no file, two jobs are the same, or some cannot be run; all are
            named.
        OSError: The file cannot be read.
    """
    jobs: list[Job] = []
    errors = []
    for block in _blocks(file):
        try:
            if isinstance(block, CostGrid):
                jobs += cost_jobs(block, file, output_dir)
            else:
                jobs += _run_jobs(block, file, output_dir)
        except ValueError as error:
            errors.append(str(error))
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            errors.append(f"{file}: give files different names, and each value once: {name} comes more than once")
    if errors:
        raise ValueError("\n".join(errors))
    return jobs


def _blocks(file: Path) -> list[RunGrid | CostGrid]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        blocks = content if content and isinstance(content, list) else [content]
        return [(CostGrid if _is_cost(block) else RunGrid).model_validate(block) for block in blocks]
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(
            f"{file}: expected `recipes`, a list of lists of files, or `networks`, a list of models, and `grid`, a "
            f"list of values for each key; or several such blocks: {error}"
        ) from error


def _is_cost(block: Any) -> bool:
    return isinstance(block, dict) and "networks" in block


def _run_jobs(block: RunGrid, file: Path, output_dir: Path) -> list[Job]:
    jobs: list[Job] = []
    errors = []
    combinations = itertools.product(itertools.product(*_recipes(block, file)), itertools.product(*block.grid.values()))
    for paths, values in combinations:
        chosen = {key: _as_argument(value) for key, value in zip(block.grid, values, strict=True)}
        varied = {key: f"{key}={text}" for key, text in chosen.items() if len(block.grid[key]) > 1}
        parts = [path.stem for path in paths]
        setting = ", ".join([*parts, *(text for key, text in varied.items() if key != "seed")])
        arguments = [argument for path in paths for argument in ("--config", str(path))]
        arguments += [*(f"{key}={text}" for key, text in chosen.items()), "output_dir=."]
        try:
            config = load_config(arguments)
        except ConfigError as error:
            errors.append(f"{setting}: {error}")
            continue
        # The id of a model on the Hub has a slash.
        folder = output_dir / "--".join([*parts, *varied.values()]).replace("/", "_")
        folders = {"output_dir": str(folder), "cache_dir": str(output_dir / "cache")}
        jobs.append(RunJob(setting, folder, config.model_copy(update=folders)))
    if errors:
        raise ValueError("\n".join([f"{file}: {len(errors)} runs cannot be configured:", *errors]))
    return jobs


def _recipes(block: RunGrid, file: Path) -> list[list[Path]]:
    found = {pattern: matching_files(file.parent, pattern) for part in block.recipes for pattern in part}
    if missing := [pattern for pattern, paths in found.items() if not paths]:
        raise ValueError(f"{file}: no file is found for {', '.join(missing)}, seen from {file.parent}")
    return [[path for pattern in part for path in found[pattern]] for part in block.recipes]


def _as_argument(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
