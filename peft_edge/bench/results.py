"""The record of a comparison, and its table and picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from pydantic import Field

from peft_edge.profiling.figures import StackedBars, memory_panel, save_bars
from peft_edge.profiling.tables import cost_table, text_table
from peft_edge.records import JsonModel, StepProfile


class PhaseTimes(JsonModel):
    """Seconds of one step."""

    forward_s: float
    """The model and the loss."""
    backward_s: float
    """The backward pass; 0 if there is none."""
    optimizer_s: float
    """The update; 0 if there is none."""

    @property
    def step_s(self) -> float:
        """The sum of the three."""
        return self.forward_s + self.backward_s + self.optimizer_s


class BenchRow(JsonModel):
    """The figures of one contender."""

    name: str
    """Its key in `CONTENDERS`."""
    label: str
    """Its name in tables."""
    error: str = ""
    """Why it did not run; empty if it did."""
    profile: StepProfile | None = None
    """FLOPs and memory of a step, and the medians of its times."""
    rounds: list[PhaseTimes] = Field(default_factory=list)
    """The times of each round."""
    ratio_best: float | None = None
    """The fastest step, divided by the fastest step of the reference."""
    ratio_median: float | None = None
    """The median, over the rounds, of a step's time divided by that of the reference in the same round."""
    ratio_lowest: float | None = None
    """The lowest of these ratios."""
    ratio_highest: float | None = None
    """The highest of these ratios."""

    def compare(self, reference: Sequence[PhaseTimes]) -> None:
        """Set the ratios to the times of the reference, round by round, and the medians in the profile."""
        ratios = [own.step_s / other.step_s for own, other in zip(self.rounds, reference, strict=True)]
        self.ratio_best = min(times.step_s for times in self.rounds) / min(times.step_s for times in reference)
        self.ratio_median = statistics.median(ratios)
        self.ratio_lowest, self.ratio_highest = min(ratios), max(ratios)
        if self.profile is not None:
            for phase in PhaseTimes.model_fields:
                median = statistics.median(getattr(times, phase) for times in self.rounds)
                setattr(self.profile, phase, median or None)


class BenchRecord(JsonModel):
    """One comparison."""

    created_at: str
    """When it started: ISO 8601, UTC."""
    setting: dict[str, str | int]
    """Backbone, classes, batch and image size, LoRA rank, rounds and threads."""
    rows: list[BenchRow]
    """One for each contender; the first is the reference."""
    total_time: float
    """Seconds of the whole comparison."""
    load_average: list[float | None]
    """Processes that wanted a core, in the minute before the start and before the end. Times are less reliable if other
    processes ran."""
    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str

    @property
    def title(self) -> str:
        """The setting in one line."""
        return (
            "{backbone}, {num_classes} classes, batch {batch_size}, {image_size} px, rank {lora_rank}, AdamW, "
            "threads: {threads}, rounds: {rounds}"
        ).format(**self.setting)

    @property
    def measured(self) -> list[tuple[BenchRow, StepProfile]]:
        """The rows that ran, with their profiles."""
        return [(row, row.profile) for row in self.rows if row.profile is not None and row.rounds]


def bench_table(record: BenchRecord) -> str:
    """Return the record as text: memory and time relative to the reference, all costs, and the errors."""
    lines = [f"One training step of {record.title}"]
    if record.measured:
        lines += ["", "against full fine-tuning in channels_last, measured in the same rounds", _comparison(record)]
        lines.append("unless the label says otherwise, ours are lean, with frozen BatchNorm that works in place")
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
    """Draw memory by kind, and the median time by phase with its spread over the rounds; see `save_bars`.

    At least one contender must have run.
    """
    rows, profiles = zip(*record.measured, strict=True)
    save_bars([row.label for row in rows], [memory_panel(profiles), _time_panel(rows)], path, title=record.title)


def _time_panel(rows: Sequence[BenchRow]) -> StackedBars:
    def length(row: BenchRow, phase: str) -> float:
        # Mean shares, unlike medians, add up to 1.
        share = statistics.fmean(getattr(times, phase) / times.step_s for times in row.rounds)
        return (row.ratio_median or 0) * share

    return StackedBars(
        label="time of a step, as a multiple of full fine-tuning's",
        parts={phase.removesuffix("_s"): [length(row, phase) for row in rows] for phase in PhaseTimes.model_fields},
        spread=[(row.ratio_lowest or 0, row.ratio_highest or 0) for row in rows],
        line=1.0,
    )
