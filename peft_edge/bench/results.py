"""The record of a comparison, and what is made of it: a table and a picture."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from peft_edge.profiling.figures import Panel, memory_panel, save_bars
from peft_edge.profiling.tables import cost_table, text_table
from peft_edge.records import StepProfile


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Seconds of one step."""

    forward_s: float
    """The model and the loss."""

    backward_s: float
    """The backward pass; 0 where there is none."""

    optimizer_s: float
    """The update; 0 where there is none."""

    @property
    def step_s(self) -> float:
        """All three."""
        return self.forward_s + self.backward_s + self.optimizer_s


@dataclass(kw_only=True)
class BenchRow:
    """What one contender took."""

    name: str
    """The key in `CONTENDERS`."""

    label: str
    """What it is called in tables."""

    error: str = ""
    """Why it did not run; empty where it did."""

    profile: StepProfile | None = None
    """FLOPs and memory of a step, and the medians of its times."""

    rounds: list[PhaseTimes] = field(default_factory=list)
    """The times of every round."""

    ratio_best: float | None = None
    """The fastest step, over the reference's fastest."""

    ratio_median: float | None = None
    """The median over the rounds of a step's time, over the reference's in the same round."""

    ratio_lowest: float | None = None
    """The lowest of these."""

    ratio_highest: float | None = None
    """The highest of these."""

    def compare(self, reference: Sequence[PhaseTimes]) -> None:
        """Sets the ratios, and the medians in the profile.

        Args:
            reference: The reference's times, round for round.
        """
        ratios = [own.step_s / other.step_s for own, other in zip(self.rounds, reference, strict=True)]
        self.ratio_best = min(times.step_s for times in self.rounds) / min(times.step_s for times in reference)
        self.ratio_median = statistics.median(ratios)
        self.ratio_lowest, self.ratio_highest = min(ratios), max(ratios)
        if self.profile is not None:
            for phase in ("forward_s", "backward_s", "optimizer_s"):
                median = statistics.median(getattr(times, phase) for times in self.rounds)
                setattr(self.profile, phase, median or None)


@dataclass(kw_only=True)
class BenchRecord:
    """One comparison."""

    created_at: str
    """When it started: ISO 8601, UTC."""

    setting: dict[str, Any]
    """Backbone, classes, batch and image size, LoRA rank, rounds and threads."""

    rows: list[BenchRow]
    """One for each contender; the first is the reference."""

    total_time: float
    """Seconds of all of it."""

    load_average: list[float | None]
    """How many processes wanted a core in the minute before the start and before the end: times are worth less where
    others did."""

    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str

    def to_json(self) -> str:
        """Returns the record as JSON text."""
        return json.dumps(TypeAdapter(BenchRecord).dump_python(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchRecord:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, or a field is missing or unknown.
        """
        blocks = json.loads(text)
        try:
            return cls(**{**blocks, "rows": [_row(row) for row in blocks["rows"]]})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not the record of a comparison: {error}") from error

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        return (
            "{backbone}, {num_classes} classes, batch {batch_size}, {image_size} px, rank {lora_rank}, AdamW, "
            "threads: {threads}, rounds: {rounds}"
        ).format(**self.setting)

    @property
    def measured(self) -> list[tuple[BenchRow, StepProfile]]:
        """The rows that ran, with their profiles."""
        return [(row, row.profile) for row in self.rows if row.profile is not None and row.rounds]


def _row(block: dict[str, Any]) -> BenchRow:
    profile = None if block["profile"] is None else StepProfile(**block["profile"])
    return BenchRow(**{**block, "profile": profile, "rounds": [PhaseTimes(**times) for times in block["rounds"]]})


def bench_table(record: BenchRecord) -> str:
    """Returns the record as lines of text: memory and time against the reference, then the costs in full.

    What did not run stands below, with the reason.
    """
    lines = [f"One training step of {record.title}"]
    if record.measured:
        lines += ["", "against full fine-tuning in channels_last, measured in the same rounds", _comparison(record)]
        lines.append("ours are lean with frozen BatchNorm, folded, where nothing else is said")
        lines += ["", cost_table({row.label: profile for row, profile in record.measured})]
    if failed := [row for row in record.rows if row.error]:
        lines += ["", "did not run", *(f"  {row.label}: {row.error}" for row in failed)]
    loads = ", ".join("-" if load is None else f"{load:.1f}" for load in record.load_average)
    lines += ["", f"load average before and after: {loads}, on {record.system_info['cores']} cores"]
    return "\n".join(lines)


def _comparison(record: BenchRecord) -> str:
    reference = record.measured[0][1].memory_peak_bytes or 0
    rows = [["", "MiB", "times", "ms", "time", "time", "time"]]
    rows.append(["", "peak", "less", "best", "best", "median", "spread"])
    for row, profile in record.measured:
        peak = profile.memory_peak_bytes or 0
        rows.append(
            [
                row.label,
                f"{peak / 2**20:,.0f}",
                f"{reference / peak:.1f}",
                f"{1e3 * min(times.step_s for times in row.rounds):,.0f}",
                f"{row.ratio_best:.2f}",
                f"{row.ratio_median:.2f}",
                f"{row.ratio_lowest:.2f}-{row.ratio_highest:.2f}",
            ]
        )
    return text_table(rows)


def save_bench_figure(record: BenchRecord, path: str | os.PathLike[str]) -> None:
    """Draws memory by kind, and the median time by phase with its spread over the rounds; see `save_bars`.

    Args:
        record: With at least one contender that ran.
        path: Where to; a .png, .svg or .pdf file.
    """
    rows, profiles = zip(*record.measured, strict=True)
    save_bars([row.label for row in rows], [memory_panel(profiles), _time_panel(rows)], Path(path), title=record.title)


def _time_panel(rows: Sequence[BenchRow]) -> Panel:
    return Panel(
        label="time of a step, as a multiple of full fine-tuning's",
        parts={
            phase: [(row.ratio_median or 0) * _share(row.rounds, f"{phase}_s") for row in rows]
            for phase in ("forward", "backward", "optimizer")
        },
        spread=[(row.ratio_lowest or 0, row.ratio_highest or 0) for row in rows],
        line=1.0,
    )


def _share(rounds: Sequence[PhaseTimes], phase: str) -> float:
    """Of a step's time: the mean, so that the phases add up."""
    return statistics.fmean(getattr(times, phase) / times.step_s for times in rounds)
