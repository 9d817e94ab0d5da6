"""Define the record that `peft-edge bench` writes, and show it as text tables and as a figure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from pydantic import Field

from peft_edge.profiling.figures import StackedBars, save_bars
from peft_edge.profiling.tables import cost_table, text_table
from peft_edge.records import JsonModel, StepProfile


class PhaseTimes(JsonModel):
    """The seconds that each phase of one step took."""

    forward_s: float
    """Forward pass, including the loss."""
    backward_s: float
    """Backward pass. 0 if the step has no backward pass."""
    optimizer_s: float
    """Update by the optimizer. 0 if the step has no update."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step: the sum of all phases."""
        return self.forward_s + self.backward_s + self.optimizer_s


class BenchRow(JsonModel):
    """The measurements of one contender."""

    name: str
    """Key in `CONTENDERS`."""
    label: str
    """Name in tables."""
    error: str = ""
    """The error message if the contender did not run, otherwise an empty string."""
    profile: StepProfile | None = None
    """FLOPs and memory of a step, and the median times of its phases.

    The profile of a compiled step contains only the number of trainable parameters, the times and the memory of the
    process. `profile` is None if the contender did not run. In the rows of `BenchRecord.rows_without_huge_pages`,
    it is always None."""
    rounds: list[PhaseTimes] = Field(default_factory=list)
    """The times of the timed steps, one for each round. Empty if the contender did not run."""
    ratio_best: float | None = None
    """Time of the contender's fastest step divided by the time of the reference's fastest step.

    The reference is full fine-tuning. The four fields `ratio_...` are None if the contender did not run.
    """
    ratio_median: float | None = None
    """The median of the ratios of the rounds.

    The ratio of a round is the contender's step time divided by the reference's step time in the same round."""
    ratio_lowest: float | None = None
    """The lowest of the ratios of the rounds."""
    ratio_highest: float | None = None
    """The highest of the ratios of the rounds."""
    rss_growth_bytes: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Peak memory of the process during all rounds, minus the memory of the process before the first round.

    The model and the optimizer's state exist before the first round, so the growth does not include their memory. The
    value is None if the contender did not run, if the system cannot reset its peak counter, or if the row is from
    an earlier version of this package.
    """
    compile_s: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Seconds of the first step, in which `torch.compile` compiles the model.

    None if the contender does not use `torch.compile`, or if the contender failed before the first round."""

    def compare(self, reference: Sequence[PhaseTimes]) -> None:
        """Set the four fields `ratio_...` from the step times in `rounds` and in `reference`.

        `reference` contains the times of full fine-tuning, one entry for each round. Also set each time in `profile` to
        the median over `rounds`. If this median is 0, set the time to None.
        """
        ratios = [own.step_s / other.step_s for own, other in zip(self.rounds, reference, strict=True)]
        self.ratio_best = min(times.step_s for times in self.rounds) / min(times.step_s for times in reference)
        self.ratio_median = statistics.median(ratios)
        self.ratio_lowest, self.ratio_highest = min(ratios), max(ratios)
        if self.profile is not None:
            for phase in PhaseTimes.model_fields:
                median = statistics.median(getattr(times, phase) for times in self.rounds)
                setattr(self.profile, phase, median or None)


class BenchRecord(JsonModel):
    """A comparison of contenders on one network."""

    created_at: str
    """Start of the comparison: ISO 8601, UTC."""
    setting: dict[str, str | int]
    """The settings of the comparison.

    They are the name of the backbone, the number of classes, the batch size, the image size, the LoRA rank, the number
    of rounds and the number of threads."""
    rows: list[BenchRow]
    """One row for each contender. The first row is the reference."""
    rows_without_huge_pages: list[BenchRow] = Field(default=[], exclude_if=lambda rows: not rows)
    """Times and memory of the same contenders in processes without huge pages. Empty if not measured.

    The ratios of these rows refer to full fine-tuning without huge pages."""
    total_time: float
    """Seconds of the whole comparison."""
    load_average: list[float | None]
    """The system's load average over one minute, at the start and at the end of the comparison.

    A high value at the start means that other processes were running, so the times are less reliable. An entry is None
    if the system does not report a load average."""
    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str

    @property
    def title(self) -> str:
        """The network, input sizes, optimizer and measurement settings as text."""
        return (
            "{backbone}, {num_classes} classes, batch {batch_size}, {image_size} px, rank {lora_rank}, AdamW, "
            "threads: {threads}, rounds: {rounds}"
        ).format(**self.setting)

    @property
    def measured(self) -> list[tuple[BenchRow, StepProfile]]:
        """The row and the profile of each contender that ran, as pairs."""
        return [(row, row.profile) for row in self.rows if row.profile is not None and row.rounds]


def bench_table(record: BenchRecord) -> str:
    """Return the record as text.

    The text contains a table that compares the contenders with full fine-tuning, a table of all costs, the errors, the
    load average, and whether large tensors were in huge pages.
    """
    lines = [f"One training step of {record.title}"]
    if record.measured:
        lines += ["", "against full fine-tuning in channels_last, measured in the same rounds", _comparison(record)]
        lines += ["", cost_table({row.label: profile for row, profile in record.measured})]
    if failed := [row for row in record.rows if row.error]:
        lines += ["", "did not run", *(f"  {row.label}: {row.error}" for row in failed)]
    loads = ", ".join("-" if load is None else f"{load:.1f}" for load in record.load_average)
    lines += ["", f"load average before and after: {loads}, on {record.system_info['cores']} cores"]
    if (state := record.system_info.get("huge_pages")) is not None:
        lines.append(f"large tensors in huge pages: {state}")
    return "\n".join(lines)


def _comparison(record: BenchRecord) -> str:
    """Return a table with the memory and time of each contender that ran.

    The table also compares the memory and the time with those of full fine-tuning, as ratios.
    """
    reference = record.measured[0][1].memory_peak_bytes
    rows = [["", "MiB", "times", "MiB", "ms", "time", "time", "time", "s to"]]
    rows.append(["", "tensors", "less", "process", "best", "best", "median", "spread", "compile"])
    for row, profile in record.measured:
        peak = profile.memory_peak_bytes
        times_less = None if peak is None or reference is None else reference / peak
        rows.append(
            [
                row.label,
                *(_scaled(peak, 2**20), "-" if times_less is None else f"{times_less:.1f}"),
                *(_scaled(row.rss_growth_bytes, 2**20), *_times(row)),
                *(f"{row.ratio_median:.2f}", f"{row.ratio_lowest:.2f}-{row.ratio_highest:.2f}"),
                _scaled(row.compile_s, 1),
            ]
        )
    if others := {row.name: row for row in record.rows_without_huge_pages if row.rounds}:
        rows[0] += ["without", "huge", "pages"]
        rows[1] += ["process", "ms", "time"]
        for cells, (row, _) in zip(rows[2:], record.measured, strict=True):
            other = others.get(row.name)
            cells += ["-"] * 3 if other is None else [_scaled(other.rss_growth_bytes, 2**20), *_times(other)]
    return text_table(rows)


def _times(row: BenchRow) -> tuple[str, str]:
    """Return two texts: the milliseconds of the fastest step, and `ratio_best`."""
    return f"{1e3 * min(times.step_s for times in row.rounds):,.0f}", f"{row.ratio_best:.2f}"


def _scaled(value: float | None, unit: int) -> str:
    """Return `value` divided by `unit` as text, or `-` if `value` is None."""
    return "-" if value is None else f"{value / unit:,.0f}"


def save_bench_figure(record: BenchRecord, path: str | os.PathLike[str]) -> None:
    """Draw two panels of stacked bars: the peak memory of tensors by kind, and `ratio_median` by phase.

    In the first panel, diamonds show the memory growth of the process (`rss_growth_bytes`). In the second panel, error
    bars show `ratio_lowest` and `ratio_highest`. The diamonds in this panel show the median of another ratio: the time
    of a step without huge pages divided by the time of full fine-tuning with huge pages. At least one contender must
    have run. For the format of the file and the errors, see `save_bars`.
    """
    rows, profiles = zip(*record.measured, strict=True)
    panels = [_memory_panel(rows, profiles), _time_panel(rows, record.rows_without_huge_pages)]
    save_bars([row.label for row in rows], panels, path, title=record.title)


def _memory_panel(rows: Sequence[BenchRow], profiles: Sequence[StepProfile]) -> StackedBars:
    parts = {
        "activations": ["activations"],
        "temporaries": ["temporaries"],
        "weights and optimizer": ["parameters", "buffers", "gradients", "optimizer"],
    }

    def length(profile: StepProfile, kinds: Sequence[str]) -> float:
        return sum(getattr(profile, f"memory_{kind}_bytes") or 0 for kind in kinds) / 2**20

    growth = [None if row.rss_growth_bytes is None else row.rss_growth_bytes / 2**20 for row in rows]
    return StackedBars(
        label="tensors at the peak of a step [MiB]",
        parts={part: [length(profile, kinds) for profile in profiles] for part, kinds in parts.items()},
        marks={"growth of the process": growth} if any(growth) else {},
        number_format=",.0f",
    )


def _time_panel(rows: Sequence[BenchRow], others: Sequence[BenchRow]) -> StackedBars:
    def length(row: BenchRow, phase: str) -> float:
        # The mean fractions of the three phases add up to 1. The median fractions would not.
        fraction = statistics.fmean(getattr(times, phase) / times.step_s for times in row.rounds)
        return (row.ratio_median or 0) * fraction

    reference = rows[0].rounds
    without = {row.name: _ratio(row.rounds, reference) for row in others if row.rounds}
    return StackedBars(
        label="time of a step / that of full fine-tuning",
        parts={phase.removesuffix("_s"): [length(row, phase) for row in rows] for phase in PhaseTimes.model_fields},
        spread=[(row.ratio_lowest or 0, row.ratio_highest or 0) for row in rows],
        line=1.0,
        marks={"without huge pages": [without.get(row.name) for row in rows]} if without else {},
        number_format=".2f",
    )


def _ratio(rounds: Sequence[PhaseTimes], reference: Sequence[PhaseTimes]) -> float:
    """Divide each round's step time by the reference's step time in that round, and return the median of the ratios."""
    return statistics.median(own.step_s / other.step_s for own, other in zip(rounds, reference, strict=True))
