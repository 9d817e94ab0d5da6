"""Many runs from one grid: which they are, how they are run side by side, and the table of what came of them."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from accelerate.state import AcceleratorState
from pydantic import Field, ValidationError
from tqdm.auto import tqdm

from peft_edge import training
from peft_edge.config import ConfigError, RunConfig, Section, load_config
from peft_edge.methods import CHOICES
from peft_edge.profiling.tables import text_table
from peft_edge.records import SUCCESS, Record
from peft_edge.training.results import SOURCE, TARGET


class Grid(Section):
    """What a grid file holds."""

    recipes: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    """Configuration files, with wildcards: a run takes one of each list, a later one over an earlier one."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """Values to try for each of some keys."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    setting: str
    """What is run, apart from the seed: cells of one setting are averaged."""

    config: RunConfig
    """Its configuration."""

    @property
    def record(self) -> Record | None:
        """What came of it; None if this has not been run.

        Raises:
            ValueError: The record is damaged; the message names the file.
        """
        record = training.read_record(Path(self.config.output_dir))
        if record is None:
            return None
        # A folder may hold a run of the same name from before a recipe was changed, and it may have been moved.
        asked = self.config.model_dump(exclude={"output_dir", "cache_dir"})
        done = record.run_info.train_config
        return record if {**done, **asked} == done else None

    @property
    def is_finished(self) -> bool:
        """Whether it has been run and has succeeded."""
        record = self.record
        return record is not None and record.train_info.status == SUCCESS


def read_grid(file: Path, output_dir: Path) -> list[Cell]:
    """Reads a grid, and checks the configuration of every run in it.

    Args:
        file: YAML with the keys of `Grid`; its files are relative to this one. Every combination is a run.
        output_dir: Each run gets a folder in it.

    Raises:
        ValueError: The file is no grid, a pattern finds no file, two runs are the same, or configurations have errors;
            all are named.
        OSError: The file cannot be read.
    """
    recipes, grid = _read(file)
    cells: dict[str, Cell] = {}
    errors = []
    for paths, values in itertools.product(itertools.product(*recipes), itertools.product(*grid.values())):
        chosen = {key: _as_argument(value) for key, value in zip(grid, values, strict=True)}
        parts = [path.stem for path in paths]
        varied = [f"{key}={text}" for key, text in chosen.items() if key != "seed" and len(grid[key]) > 1]
        setting = ", ".join([*parts, *varied])
        name = "--".join([*parts, *(f"{key}={text}" for key, text in chosen.items() if len(grid[key]) > 1)])
        arguments = [argument for path in paths for argument in ("--config", str(path))]
        arguments += [*(f"{key}={text}" for key, text in chosen.items()), "output_dir=."]
        try:
            config = load_config(arguments, choices=CHOICES)
        except ConfigError as error:
            errors.append(f"{setting}: {error}")
            continue
        if name in cells:
            errors.append(f"{name} comes twice: give the files different names, and each value once")
        folders = {"output_dir": str(output_dir / name), "cache_dir": str(output_dir / "cache")}
        cells[name] = Cell(setting, config.model_copy(update=folders))
    if errors:
        raise ValueError("\n".join([f"{file}: {len(errors)} runs cannot be configured:", *errors]))
    return list(cells.values())


def _as_argument(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _read(file: Path) -> tuple[list[list[Path]], dict[str, list[Any]]]:
    try:
        grid = Grid.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(
            f"{file}: expected `recipes`, a list of lists of files, and `grid`, a list of values for each key: {error}"
        ) from error
    found = {pattern: _files(file.parent, pattern) for part in grid.recipes for pattern in part}
    if missing := [pattern for pattern, paths in found.items() if not paths]:
        raise ValueError(f"{file}: no file is found for {', '.join(missing)}, seen from {file.parent}")
    return [[path for pattern in part for path in found[pattern]] for part in grid.recipes], grid.grid


def _files(folder: Path, pattern: str) -> list[Path]:
    path = (folder / pattern).absolute()
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def run_grid(cells: Sequence[Cell], *, jobs: int = 1) -> None:
    """Runs what is not finished. A run that fails leaves its record, and the others go on.

    Args:
        cells: From `read_grid`. What each prints is in `<folder>.log`.
        jobs: Processes that work side by side.

    Raises:
        OSError: The system has killed one of them.
    """
    unfinished = [cell for cell in cells if not cell.is_finished]
    if not unfinished:
        return
    # Threads and locks of this process must not be copied into the others.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_the_study) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(unfinished), desc="runs", unit="run") as bar,
    ):
        try:
            for future in as_completed([pool.submit(_run, cell.config) for cell in _sources_first(unfinished)]):
                future.result()
                bar.update()
        except BrokenProcessPool as error:
            raise OSError(
                "a process of the study was killed, perhaps for want of memory: run it again with fewer jobs; what is "
                "finished is kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _sources_first(cells: Sequence[Cell]) -> list[Cell]:
    """One run of each source model before the others, which would wait for it to be trained."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        config = cell.config
        groups.setdefault(repr((config.backbone, config.data, config.source, config.seed)), []).append(cell)
    first = [group.pop(0) for group in groups.values()]
    return first + [cell for group in groups.values() for cell in group]


def _end_with_the_study() -> None:
    """Ends this process when the study's is killed, which would otherwise leave it to work off the queue alone."""
    study = multiprocessing.parent_process()
    assert study is not None

    def wait() -> None:
        study.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(config: RunConfig) -> None:
    log = Path(f"{config.output_dir}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # Accelerate keeps the settings of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            training.run(config)
        except Exception as error:
            # Whatever it is, it stands in the record, and the other runs go on.
            print(f"error: {error}")


_COLUMNS: dict[str, tuple[str, Callable[[Record], float | None]]] = {
    "accuracy": (".3f", lambda record: record.train_info.metrics[-1][TARGET]),
    "source accuracy": (".3f", lambda record: record.train_info.metrics[-1][SOURCE]),
    "retained": (".3f", lambda record: record.train_info.metrics[-1]["retention"]),
    "trained parameters": (",.0f", lambda record: record.train_info.num_trainable_params),
    "saved bytes": (",.0f", lambda record: record.train_info.file_size),
    "training seconds": (".1f", lambda record: record.train_info.train_time),
}


def study_table(cells: Sequence[Cell]) -> str:
    """Returns a line for each setting as text: the mean over the seeds, and with several their standard deviation.

    The first column says how many runs have succeeded, and what became of the others.
    """
    settings: dict[str, list[Record | None]] = {}
    for cell in cells:
        settings.setdefault(cell.setting, []).append(cell.record)
    rows = [["", "runs", *_COLUMNS]]
    for setting, records in settings.items():
        finished = [record for record in records if record is not None and record.train_info.status == SUCCESS]
        statuses = {"not run" if record is None else record.train_info.status for record in records} - {SUCCESS}
        figures = [_mean([value(record) for record in finished], style) for style, value in _COLUMNS.values()]
        rows.append([setting, ", ".join([str(len(finished)), *sorted(statuses)]), *figures])
    return text_table(rows)


def _mean(values: Sequence[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.fmean(known), style)
    return mean if len(set(known)) == 1 else f"{mean} ± {format(statistics.stdev(known), style)}"
