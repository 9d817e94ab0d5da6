"""Many runs from one grid: which they are, how they are run side by side, and the table of what came of them."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from peft_edge import training
from peft_edge.config import ConfigError, RunConfig, load_config
from peft_edge.methods import METHODS, OPTIMIZERS
from peft_edge.profiling.tables import text_table
from peft_edge.records import SUCCESS, Record


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    setting: str
    """What is run, apart from the seed: cells of one setting are averaged."""

    config: RunConfig
    """Its configuration."""

    @property
    def record(self) -> Record | None:
        """What came of it; None if it has not been run."""
        file = Path(self.config.output_dir) / "record.json"
        return Record.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def read_grid(file: Path, output_dir: Path) -> list[Cell]:
    """Reads a grid, and checks the configuration of every run in it.

    Args:
        file: YAML with `recipes`, lists of configuration files (relative to this one; wildcards are allowed), of which
            a run takes one of each list, a later one over an earlier one; and with `grid`, a list of values for each
            of some keys. Every combination is a run.
        output_dir: Each run gets a folder in it.

    Raises:
        ValueError: The file is no grid, a pattern finds no file, or configurations have errors; all are named.
        OSError: The file cannot be read.
    """
    recipes, grid = _read(file)
    cells, errors = [], []
    for paths, values in itertools.product(itertools.product(*recipes), itertools.product(*grid.values())):
        chosen = {key: _as_argument(value) for key, value in zip(grid, values, strict=True)}
        parts = [path.stem for path in paths]
        varied = [f"{key}={text}" for key, text in chosen.items() if key != "seed" and len(grid[key]) > 1]
        setting = ", ".join([*parts, *varied])
        name = "--".join([*parts, *(f"{key}={text}" for key, text in chosen.items())])
        arguments = [argument for path in paths for argument in ("--config", str(path))]
        arguments += [f"{key}={text}" for key, text in chosen.items()]
        arguments += [f"output_dir={output_dir / name}", f"cache_dir={output_dir / 'cache'}"]
        try:
            config = load_config(arguments, choices={"method": METHODS, "training.optimizer": OPTIMIZERS})
        except ConfigError as error:
            errors.append(f"{setting}: {error}")
        else:
            cells.append(Cell(setting, config))
    if errors:
        raise ValueError("\n".join([f"{file}: {len(errors)} runs cannot be configured:", *errors]))
    return cells


def _as_argument(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _read(file: Path) -> tuple[list[list[Path]], dict[str, list[Any]]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipes = [[(pattern, sorted(file.parent.glob(pattern))) for pattern in part] for part in content["recipes"]]
        grid = {str(key): list(values) for key, values in content.get("grid", {}).items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected `recipes`, a list of lists of files, and `grid`, a list of values for each key; found "
            f"something else ({type(error).__name__}: {error})"
        ) from error
    missing = [pattern for part in recipes for pattern, found in part if not found]
    if missing:
        raise ValueError(f"{file}: no file is found for {', '.join(missing)}, seen from {file.parent}")
    return [[path for _, found in part for path in found] for part in recipes], grid


def run_grid(cells: Sequence[Cell], *, jobs: int = 1) -> None:
    """Runs what is not finished. A run that fails leaves its record, and the others go on.

    Args:
        cells: From `read_grid`. What each prints is in `log.txt` in its folder.
        jobs: Processes that work side by side.
    """
    unfinished = [cell for cell in cells if (record := cell.record) is None or record.train_info.status != SUCCESS]
    if not unfinished:
        return
    # Threads and locks of this process must not be copied into the others.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(unfinished), desc="runs", unit="run") as bar,
    ):
        # Neighbours in a grid share a source model, and would wait for each other to train it.
        shuffled = random.Random(0).sample(unfinished, len(unfinished))
        for future in as_completed([pool.submit(_run, cell.config) for cell in shuffled]):
            future.result()
            bar.update()


def _run(config: RunConfig) -> None:
    log = Path(f"{config.output_dir}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # Accelerate keeps the settings of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            training.run(config)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}")


_COLUMNS: dict[str, Callable[[Record], tuple[float | None, str]]] = {
    "accuracy": lambda record: (record.train_info.metrics[-1]["test accuracy"], ".3f"),
    "source accuracy": lambda record: (record.train_info.metrics[-1]["source test accuracy"], ".3f"),
    "retained": lambda record: (record.train_info.metrics[-1]["retention"], ".3f"),
    "trained parameters": lambda record: (record.train_info.num_trainable_params, ",.0f"),
    "saved bytes": lambda record: (record.train_info.file_size, ",.0f"),
    "training seconds": lambda record: (record.train_info.train_time, ".1f"),
}


def study_table(cells: Sequence[Cell]) -> str:
    """Returns a line for each setting as text: the mean over the seeds, and with several their standard deviation.

    A setting without a run that has succeeded has its status in place of the figures.
    """
    settings: dict[str, list[Record | None]] = {}
    for cell in cells:
        settings.setdefault(cell.setting, []).append(cell.record)
    rows = [["", "runs", *_COLUMNS]]
    for setting, records in settings.items():
        finished = [record for record in records if record is not None and record.train_info.status == SUCCESS]
        figures = [_mean([column(record) for record in finished]) for column in _COLUMNS.values()]
        statuses = {record.train_info.status if record is not None else "not run" for record in records}
        outcome = (
            f"{len(finished)}"
            if len(finished) == len(records)
            else f"{len(finished)}, {'/'.join(sorted(statuses - {SUCCESS}))}"
        )
        rows.append([setting, outcome, *figures])
    return text_table(rows)


def _mean(values: Sequence[tuple[float | None, str]]) -> str:
    known = [value for value, _ in values if value is not None]
    if not known:
        return "-"
    style = values[0][1]
    mean = format(statistics.fmean(known), style)
    return mean if len(set(known)) < 2 else f"{mean} ± {format(statistics.stdev(known), style)}"
