"""Runs that have succeeded, as rows."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_edge.methods import METHODS
from peft_edge.records import Archive, Record, StepProfile
from peft_edge.report.rows import disambiguate_labels, flat, method_order
from peft_edge.training.evaluation import TARGET

# What changes nothing of a result; and the seed, over which is averaged.
_NO_SETTING = ("model_id", "output_dir", "cache_dir", "trackers", "num_workers", "profiling", "seed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has succeeded."""

    file: str
    """The file of its record, seen from the page."""

    backbone: str
    """The network's name."""

    kind: str | None
    """`depthwise` or `standard`; None while no record of the network tells which convolutions it has."""

    task: str
    """The data and what is new in them, and what tells it from other tasks of that name."""

    method: str
    """The method, and what tells it from others of that name."""

    lora_rank: int | None
    """Rank of the adapter, or of GaLore's projection; None for a method without."""

    record: Record
    """All of it."""

    @property
    def seed(self) -> int:
        """Of the splits, the source model and the order of the images."""
        return self.record.run_info.train_config["seed"]

    @property
    def way(self) -> str:
        """What is compared: the method, and its rank if it has one."""
        return self.method if self.lora_rank is None else f"{self.method}, rank {self.lora_rank}"

    @property
    def family(self) -> str:
        """The method's name alone, and without that of the package that it comes from."""
        return self.method.split(", ")[0].removeprefix("peft-")

    @property
    def order(self) -> tuple[int, str, int]:
        """By what runs are sorted in tables."""
        return method_order(self.method.split(", ")[0]), self.method, self.lora_rank or 0

    @property
    def has_new_classes(self) -> bool:
        """Whether the target has classes that the source has not."""
        return bool(self.record.run_info.train_config["data"]["new_classes"])

    @property
    def results(self) -> dict[str, Any]:
        """The test results."""
        return self.record.train_info.metrics[-1]

    @property
    def score(self) -> float:
        """Accuracy on the target; for new classes the harmonic mean of that and the accuracy on the old ones."""
        return self.results["harmonic mean" if self.has_new_classes else TARGET]

    @property
    def score_label(self) -> str:
        """What the score is."""
        return "harmonic mean of accuracies" if self.has_new_classes else "target accuracy"

    @property
    def costs(self) -> tuple[int, int, int] | None:
        """Bytes at the peak of a step, FLOPs of all its arithmetic, and bytes shipped; None where one is unknown."""
        step, shipped = self.record.step, self.record.train_info.file_size
        if step is None or step.memory_peak_bytes is None or shipped is None:
            return None
        flops = all_flops(step)
        return None if flops is None else (step.memory_peak_bytes, flops, shipped)


def all_flops(step: StepProfile) -> int | None:
    """Returns the FLOPs of a step, the optimizer's and elementwise ones included; None if one was not counted."""
    parts = [value for name, value in vars(step).items() if name.startswith("flops_")]
    return None if None in parts else sum(parts)


def run_rows(archive: Archive, folder: str = "") -> list[Run]:
    """Returns the runs that have succeeded, by backbone, task, method, rank and seed.

    Args:
        archive: With the records.
        folder: Where its files lie, seen from the page.

    Raises:
        ValueError: Two records are of the same run.
    """
    names = list(archive.finished)
    configs = [flat(record.run_info.train_config) for record in archive.finished.values()]
    backbones = [config["backbone.name"] for config in configs]
    tasks = disambiguate_labels(
        [(backbone, _task(config)) for backbone, config in zip(backbones, configs, strict=True)],
        [_within(config, "backbone.", "data.", "source.") for config in configs],
    )
    ranks = [_rank(config) for config in configs]
    methods = disambiguate_labels(
        [
            (backbone, task, rank, config["method"])
            for backbone, task, rank, config in zip(backbones, tasks, ranks, configs, strict=True)
        ],
        [{key: value for key, value in config.items() if key.split(".")[0] not in _NO_SETTING} for config in configs],
    )
    kinds = _kinds(archive.finished.values())
    rows = [
        Run(
            file=posixpath.join(folder, name),
            backbone=backbone,
            kind=kinds.get(backbone),
            task=task,
            method=method,
            lora_rank=rank,
            record=archive.finished[name],
        )
        for name, backbone, task, rank, method in zip(names, backbones, tasks, ranks, methods, strict=True)
    ]
    rows.sort(key=lambda row: (row.backbone, row.task, row.order, row.seed))
    for row, other in itertools.pairwise(rows):
        if _identity(row) == _identity(other):
            raise ValueError(f"{row.file} and {other.file} are records of the same run: remove one of them")
    return rows


def _identity(row: Run) -> tuple[Any, ...]:
    return row.backbone, row.task, row.method, row.lora_rank, row.seed


def _within(config: Mapping[str, Any], *sections: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.startswith(sections)}


def _task(config: Mapping[str, Any]) -> str:
    return f"{config['data.name']}, {'new classes' if config['data.new_classes'] else config['data.shift']}"


def _rank(config: Mapping[str, Any]) -> int | None:
    section = METHODS[config["method"]].section if config["method"] in METHODS else None
    return {"adapter": config.get("adapter.r"), "galore": config.get("galore.rank")}.get(section or "")


def _kinds(records: Iterable[Record]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for record in records:
        changed = {change.kind for change in record.train_info.changes.values()}
        backbone = record.run_info.train_config["backbone"]["name"]
        if "depthwise" in changed:
            kinds[backbone] = "depthwise"
        elif changed:
            kinds.setdefault(backbone, "standard")
    return kinds
