"""What came of a study, as one table of its runs and one of its analyses."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peft_edge.profiling.tables import text_table
from peft_edge.records import SUCCESS
from peft_edge.study.cells import Cell, RunCell
from peft_edge.training.results import SOURCE, TARGET

# The title of a column, how its figures are written, and where they stand in a record.
_Columns = Mapping[str, tuple[str, Callable[[Any], float | None]]]

_RUN_COLUMNS: _Columns = {
    "accuracy": (".3f", lambda record: record.train_info.metrics[-1][TARGET]),
    "source accuracy": (".3f", lambda record: record.train_info.metrics[-1][SOURCE]),
    "retained": (".3f", lambda record: record.train_info.metrics[-1]["retention"]),
    "trained parameters": (",.0f", lambda record: record.train_info.num_trainable_params),
    "saved bytes": (",.0f", lambda record: record.train_info.file_size),
    "training seconds": (".1f", lambda record: record.train_info.train_time),
}
_COST_COLUMNS: _Columns = {
    "peak MiB": (",.1f", lambda record: _scaled(record.profile.memory_peak_bytes, 2**20)),
    "forward GFLOP": (",.2f", lambda record: _scaled(record.profile.flops_forward, 1e9)),
    "backward GFLOP": (",.2f", lambda record: _scaled(record.profile.flops_backward, 1e9)),
}


def study_table(cells: Sequence[Cell]) -> str:
    """Returns a line for each setting as text: the mean over the seeds, and with several their standard deviation.

    The first column says how many cells have succeeded, and what became of the others.
    """
    runs = [cell for cell in cells if isinstance(cell, RunCell)]
    costs = [cell for cell in cells if not isinstance(cell, RunCell)]
    tables = [_table(runs, "runs", _RUN_COLUMNS), _table(costs, "analyses", _COST_COLUMNS)]
    return "\n\n".join(table for table in tables if table)


def _table(cells: Iterable[Cell], title: str, columns: _Columns) -> str:
    settings: dict[str, list[Cell]] = {}
    for cell in cells:
        settings.setdefault(cell.setting, []).append(cell)
    rows = []
    for setting, group in settings.items():
        finished = [cell.record for cell in group if cell.status == SUCCESS]
        others = {cell.status for cell in group} - {SUCCESS}
        figures = [_mean([value(record) for record in finished], style) for style, value in columns.values()]
        rows.append([setting, ", ".join([str(len(finished)), *sorted(others)]), *figures])
    return text_table([["", title, *columns], *rows]) if rows else ""


def _mean(values: Sequence[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.fmean(known), style)
    return mean if len(set(known)) == 1 else f"{mean} ± {format(statistics.stdev(known), style)}"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
