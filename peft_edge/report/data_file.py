"""All records as one flat table."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import statistics
from typing import Any

from peft_edge.records import Archive, CostRecord, Record
from peft_edge.report.rows import flat, grouped

# Folders of the machine that made the record.
_FOLDERS = ("output_dir", "cache_dir")
# Of these a run has many; the record holds them.
_MANY = ("metrics", "sweep", "changes")


def data_file(archive: Archive, folder: str = "") -> str:
    """Returns the records as CSV, a row for each, whatever became of it: its file, every setting and every figure.

    Of a run's metrics there is the last entry, the test results; of its profile the whole step of the first process; of
    the changes of its kernels the medians over the layers of a kind. What a row has no value for is empty.

    Args:
        archive: With the records.
        folder: Where its files lie, seen from the page.
    """
    rows = [
        {"file": posixpath.join(folder, name), **figures}
        for name, figures in [
            *((name, _run(record)) for name, record in archive.runs.items()),
            *((name, _cost(record)) for name, record in archive.costs.items()),
        ]
    ]
    columns = ["file", "record", *sorted({key for row in rows for key in row} - {"file", "record"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _run(record: Record) -> dict[str, Any]:
    info, train = record.run_info, record.train_info
    config = {key: value for key, value in info.train_config.items() if key not in _FOLDERS}
    step = {} if record.step is None else vars(record.step)
    return {
        "record": "run",
        "total_time": info.total_time,
        **flat(config, "config."),
        **flat({key: value for key, value in vars(train).items() if key not in _MANY}, "train."),
        **flat(train.metrics[-1] if train.metrics else {}, "result."),
        **flat(step, "step."),
        **_changes(record),
    }


def _changes(record: Record) -> dict[str, float]:
    changes = record.train_info.changes.values()
    return {
        f"changes.{kind}.{figure}": statistics.median(getattr(change, figure) for change in members)
        for kind, members in grouped(changes, lambda change: change.kind).items()
        for figure in ("relative_norm", "stable_rank")
    }


def _cost(record: CostRecord) -> dict[str, Any]:
    return {
        "record": "cost",
        "network": record.network,
        "kind": record.kind,
        "config.method": record.method,
        **flat(record.setting, "setting."),
        "train.num_total_params": record.num_total_params,
        **flat(vars(record.profile), "step."),
    }


def _cell(value: Any) -> Any:
    """Text and numbers as they are; what is null stays empty."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)
