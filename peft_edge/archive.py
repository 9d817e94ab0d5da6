"""A folder of records, one JSON file each: what studies fill, and reports and plans read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peft_edge.files import written_whole
from peft_edge.records import SUCCESS, CostRecord, Record

R = TypeVar("R", Record, CostRecord)

# What tells our runs from PEFT's own records, which have the same blocks with another configuration.
_CONFIG_KEYS = {"method", "norm", "backbone", "data", "adapter"}


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The records of a folder, by their files' names relative to it, in the order of these."""

    runs: dict[str, Record] = field(default_factory=dict)
    """Runs of `train.py`, whatever became of them."""

    costs: dict[str, CostRecord] = field(default_factory=dict)
    """Analyses."""

    @property
    def finished(self) -> dict[str, Record]:
        """The runs that have succeeded."""
        return {name: run for name, run in self.runs.items() if run.train_info.status == SUCCESS}


def read_archive(folder: Path) -> Archive:
    """Reads every record in a folder and below it. Other JSON files, such as those of adapters, are passed over.

    Raises:
        ValueError: There is no record, or one is damaged; the message names the file.
    """
    archive = Archive()
    for file in sorted(folder.rglob("*.json")):
        name, record = file.relative_to(folder).as_posix(), _read(file)
        # A study keeps a record both in the folder of the run and, without local paths, among its results.
        if isinstance(record, Record) and not any(_is_same(record, other) for other in archive.runs.values()):
            archive.runs[name] = record
        elif isinstance(record, CostRecord) and record not in archive.costs.values():
            archive.costs[name] = record
    if not archive.runs and not archive.costs:
        raise ValueError(
            f"{folder} holds no record: name a folder with the record.json of runs of train.py, or the results of "
            "peft-edge study"
        )
    return archive


def read_record(file: Path, kind: type[R]) -> R | None:
    """Returns the record in a file; None if there is no file.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    try:
        return kind.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: delete it, and it is made anew ({error})") from error


def _is_same(one: Record, other: Record) -> bool:
    started, others_start = ((run.run_info.experiment_name, run.run_info.created_at) for run in (one, other))
    return started == others_start and one.train_info == other.train_info


def _read(file: Path) -> Record | CostRecord | None:
    try:
        block = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if _is_run(block):
        return read_record(file, Record)
    return read_record(file, CostRecord) if _is_cost(block) else None


def _is_run(block: Any) -> bool:
    try:
        return _CONFIG_KEYS.issubset(block["run_info"]["train_config"]) and "train_info" in block
    except (KeyError, TypeError):
        return False


def _is_cost(block: Any) -> bool:
    return isinstance(block, dict) and {"network", "method", "profile"}.issubset(block)


def add_record(folder: Path, name: str, record: Record | CostRecord) -> Path:
    """Writes a record to a file of its own, on one line: a study has hundreds of them.

    Args:
        folder: The archive.
        name: Of the file, without its ending; the same name replaces the record.
        record: What is written.

    Returns:
        The file.
    """
    file = folder / f"{name}.json"
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(json.loads(record.to_json()), separators=(",", ":")) + "\n", encoding="utf-8")
    return file
