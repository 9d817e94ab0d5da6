"""Compare training steps with claims of the source study. Define `Claim`, and functions that format numbers and tables.

The source study is arXiv 2507.23536. The report page repeats the measurements of this study. The template of the page
contains the fixed text of each section. The functions in this module compute the parts that depend on the records: the
verdict on a claim of the source study, the finding, the table, the data and the charts. The module `run_claims`
computes these parts from the records of training runs, and uses the classes and functions of this module.

If the required records are missing, each `..._claim` function of both modules returns a claim with the verdict
`NOT_MEASURED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from typing import NamedTuple

from pandas import DataFrame, concat, isna

from peft_edge.report.charts import draw_grouped_bars, draw_stacked_bars
from peft_edge.report.frames import AS_IS, LEAN, MEMORY_PARTS, NETWORK_KINDS, STORED

AGREED, IN_PART, NOT_AGREED, NOT_MEASURED = "Agreed", "In part", "Not agreed", "Not measured"

STUDY_FAMILIES = ("lora", "dora", "galore")
"""The methods that the source study compares with full fine-tuning, as named in the column `family` of frames."""

ABOUT_HALF = (0.25, 0.75)
"""The smallest and the largest ratio that count as "about half". Ratios between them are nearer to 0.5 than to 0 or 1.

The ratio is the share of memory that a method saves on depthwise-separable networks, divided by the share that it saves
on language models.
"""

AGREEING_REDUCTION = 0.9
"""The smallest reduction of FLOPs that agrees with the source study, as a fraction. The study reports up to 0.95."""

NO_VALUE = "-"
"""Text of a table cell without a value."""

CONTENDERS_ONLY_IN_CSV = {
    "plain inference",
    "full, eval norms",
    "PEFT LoRA, dense, compiled",
    "PEFT LoRA, dense, eval norms, checkpointed",
    "PEFT DoRA, dense",
    "LyCORIS LoCon, dense",
    "loralib ConvLoRA, dense",
    "our GaLore, dense, not lean",
    "our LoRA, dense, lean, checkpointed",
    "our LoRA, dense, frozen norms, not lean",
    "our LoRA, all convolutions, frozen norms, lean, recompute, split",
    "our LoRA, project, frozen norms, lean",
    "our LoRA-FA, project, frozen norms, lean",
    "our DoRA, dense, frozen norms, lean",
}
"""Labels of contenders of the bench that the page leaves out, to keep its table short."""

CSV_NAMES = {
    "backbone": "network",
    "variant": "method",
    "is_equal": "not_distinguishable_from_best",
    "memory": "peak_bytes",
    "peak": "peak_bytes",
    "full_peak": "full_peak_bytes",
    "flops": "flops_per_step",
    "full_flops": "full_flops_per_step",
    "shipped": "shipped_bytes",
    "file": "record",
    "full_file": "full_record",
}
"""A dict from names of columns in frames to their names in CSV files. All other columns keep their names."""

_GRID = "configs/study/costs.yaml"
_LARGEST_REDUCTIONS = {
    f"{AS_IS}, exact": "Counted exactly, the largest reduction by an adapter is {}.",
    f"{AS_IS}, source study's accounting": "By the source study's accounting it is {}.",
    f"{STORED}, exact": "Counted exactly on stored features it is {}.",
}
_EXACT, _STUDY_COUNT, _STORED_EXACT = _LARGEST_REDUCTIONS
_COUNTS = [_STUDY_COUNT, _EXACT, f"{LEAN}, exact", _STORED_EXACT]


class Chart(NamedTuple):
    """The caption of a figure, and the function `draw`, which takes a path without a suffix and writes the figure."""

    caption: str
    draw: Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The result of comparing the records of runs or steps with one claim of the source study (arXiv 2507.23536).

    Attributes:
        verdict: `AGREED`, `IN_PART`, `NOT_AGREED` or `NOT_MEASURED`.
        finding: The main result as text.
        details: Further results as text.
        setting: Ranks and input sizes of the measured steps, as text.
        table: The table on the report page, which `markdown_table` formats.
        data: The full table for the CSV file. Each row names the files of its records.
        charts: A dict from file names, without a suffix, to figures.
    """

    verdict: str
    finding: str
    details: str = ""
    setting: str = ""
    table: DataFrame | None = None
    data: DataFrame | None = None
    charts: Mapping[str, Chart] = field(default_factory=dict)


def not_measured(lacking: str, grid: str) -> Claim:
    """Return a claim with the verdict `NOT_MEASURED`.

    The `finding` of the claim says which records are missing (`lacking`), and gives a command that creates them. The
    command runs the study that the file `grid` describes.
    """
    command = f"peft-edge study --grid {grid} --output-dir runs"
    finding = f"There is no record of {lacking}; `{command}` makes them, in `runs/results`."
    return Claim(verdict=NOT_MEASURED, finding=finding)


def verdict_of(agreeing: int, total: int) -> str:
    """Return "Agreed" if all `total` cases agree with the source study, "Not agreed" if none does, else "In part"."""
    return AGREED if agreeing == total else IN_PART if agreeing else NOT_AGREED


def memory_claim(costs: DataFrame) -> Claim:
    """Compare the memory savings of methods on depthwise-separable networks and on language models.

    `costs` is the result of `cost_frame`.
    """
    kinds: set[str] = set()
    if not costs.empty:
        steps = comparable_steps(costs)
        steps = steps[steps["accounting"] == "exact"].sort_values("batch_size", kind="stable")
        as_is = steps[(steps["form"] == AS_IS) & steps["family"].isin(STUDY_FAMILIES)]
        kinds = set(as_is["kind"])
    if missing := sorted({"depthwise", "transformer"} - kinds):
        return not_measured(f"a step of {' and of '.join(missing)} networks with {', '.join(STUDY_FAMILIES)}", _GRID)
    pairs = _mean_savings(as_is, "variant").dropna(subset=["depthwise", "transformer"])
    if pairs.empty:
        return not_measured("the same method and batch size on both kinds of networks", _GRID)
    less, half = int((pairs["depthwise"] < pairs["transformer"]).sum()), int(pairs["ratio"].between(*ABOUT_HALF).sum())
    means = _mean_savings(steps, "method")
    ours = ", ".join(
        f"{percent(saved)} % ({form}, batch {batch_size})"
        for form in (LEAN, STORED)
        for (batch_size, method), saved in means["depthwise"].dropna().items()
        if method == f"lora ({form})"
    )
    table = means[list(NETWORK_KINDS)].map(percent).add_suffix(" [%]")
    table["depthwise / transformer"] = [fixed(ratio, 2) for ratio in means["ratio"]]
    table.index = table.index.set_names(["batch", "method"])
    fractions = steps[MEMORY_PARTS].div(steps["full_peak"], axis=0).add_prefix("share_")
    columns = ["kind", "network", "batch_size", "method", "peak", "full_peak", "saved_memory"]
    return Claim(
        verdict=AGREED if half == len(pairs) else IN_PART if less else NOT_AGREED,
        finding=(
            f"Of {len(pairs)} pairs of method and batch size, {less} save less on depthwise-separable networks than on "
            f"language models, {'and' if half == less else 'but only'} {half} save about half as much."
            + (f" Our LoRA saves {ours} on depthwise-separable networks." if ours else "")
        ),
        setting=_setting_text(steps),
        table=table,
        data=concat([steps[columns], fractions, steps[["file", "full_file"]]], axis=1).rename(columns=CSV_NAMES),
        charts={
            f"memory_batch_{batch_size}": Chart(
                f"Memory at the peak by kind of tensor, batch {batch_size}: means over networks",
                partial(_draw_memory, costs, rows, batch_size),
            )
            for batch_size, rows in steps.groupby("batch_size")
        },
    )


def _mean_savings(steps: DataFrame, label: str) -> DataFrame:
    """Return the mean of the column `saved_memory` for each batch size and each value of the column named `label`.

    The result has a column for each of `NETWORK_KINDS`. Its column `ratio` contains the mean for depthwise-separable
    networks divided by the mean for transformers.
    """
    means = steps.pivot_table(index=["batch_size", label], columns="kind", values="saved_memory", sort=False)
    means = means.reindex(columns=list(NETWORK_KINDS))
    # If a method saves no memory on transformers, the ratio has no meaning.
    means["ratio"] = (means["depthwise"] / means["transformer"]).where(means["transformer"] > 0)
    return means


def _draw_memory(costs: DataFrame, steps: DataFrame, batch_size: int, path: Path) -> None:
    # The first bars are full fine-tuning. Then come the methods, each with one bar for each kind of network.
    references = costs[costs["file"].isin(steps["full_file"])].assign(method=f"full ({AS_IS})")
    methods = list(dict.fromkeys(steps["method"]))
    steps = steps.sort_values("method", key=lambda method: method.map(methods.index), kind="stable")
    bars = concat([references, steps])
    percentages = 100 * bars[[*MEMORY_PARTS, "peak"]].div(bars["full_peak"], axis=0)
    groups = percentages.groupby(bars["method"] + ", " + bars["kind"], sort=False)
    draw_stacked_bars(
        groups[MEMORY_PARTS].mean(),
        groups["peak"].agg(["min", "max"]),
        path,
        title=f"Memory of a training step, batch {batch_size}",
        label="mean peak, and its range over networks [% of full fine-tuning's]",
    )


def arithmetic_claim(costs: DataFrame) -> Claim:
    """Compute how many FLOPs adapters save, by exact counts and by the rules of the source study (arXiv 2507.23536).

    `costs` is the result of `cost_frame`.
    """
    lacking = not_measured("an adapter's step on a convolutional network", _GRID)
    if costs.empty:
        return lacking
    steps = comparable_steps(costs)
    steps = steps[steps["family"].isin(STUDY_FAMILIES)]
    accounting = steps["accounting"].replace("source-study", "source study's accounting")
    steps = steps.assign(count=steps["form"] + ", " + accounting)
    # FLOPs are proportional to the batch size, so one batch size is enough. Take the batch size with the most different
    # values of `count` (pairs of form and accounting). If several batch sizes have equally many different values, take
    # the one with the most steps.
    coverage = {size: (rows["count"].nunique(), len(rows)) for size, rows in steps.groupby("batch_size", sort=False)}
    steps = steps[steps["batch_size"] == max(coverage, key=lambda size: coverage[size], default=None)]
    adapters = steps[steps["family"] != "galore"]
    edge_adapters = adapters[adapters["kind"] != "transformer"]
    if _EXACT not in set(edge_adapters["count"]):
        return lacking
    best = edge_adapters.loc[edge_adapters.groupby("count")["saved_flops"].idxmax()].set_index("count")
    largest = {row.Index: f"{percent(row.saved_flops)} % ({row.variant} on {row.network})" for row in best.itertuples()}
    table = adapters.pivot_table(
        index=["kind", "network"], columns=["variant", "count"], values="saved_flops", aggfunc="first", sort=False
    )
    counts = [(variant, count) for variant in adapters["variant"].unique() for count in _COUNTS]
    table = table[[count for count in counts if count in table]].map(percent)
    table.columns = [f"{variant}: {count}" for variant, count in table.columns]
    columns = ["kind", "network", "variant", "batch_size", "form", "accounting", "flops", "full_flops", "saved_flops"]
    caption = "Reduction of the forward and backward FLOPs of a step, by both accountings"
    return Claim(
        verdict=AGREED if best.loc[_EXACT, "saved_flops"] >= AGREEING_REDUCTION else NOT_AGREED,
        finding=" ".join(
            text.format(largest[count]) for count, text in _LARGEST_REDUCTIONS.items() if count in largest
        ),
        setting=f"{_setting_text(steps)}, batch {steps['batch_size'].iloc[0]}",
        table=table,
        data=steps[[*columns, "file", "full_file"]].rename(columns=CSV_NAMES),
        charts={"flops": Chart(caption, partial(_draw_arithmetic, edge_adapters))},
    )


def _draw_arithmetic(adapters: DataFrame, path: Path) -> None:
    networks, panels = adapters["network"].unique(), {}
    for variant, steps in adapters.groupby("variant", sort=False):
        saved = steps.pivot_table(index="network", columns="count", values="saved_flops", aggfunc="first")
        panels[variant] = 100 * saved.reindex(index=networks, columns=[count for count in _COUNTS if count in saved])
    draw_grouped_bars(panels, path, label="fewer forward and backward FLOPs\nthan full fine-tuning [%]")


def comparable_steps(costs: DataFrame) -> DataFrame:
    """Return the rows of `costs` that can be compared with a reference, without the references themselves.

    `costs` is the result of `cost_frame`. A reference is a step of full fine-tuning.
    """
    return costs[~costs["is_reference"] & costs["full_file"].notna()]


def _setting_text(steps: DataFrame) -> str:
    units = {"lora_rank": "rank {}", "image_size": "{} px", "sequence_length": "{} tokens"}
    values = {key: sorted(steps[key].dropna().astype(int).unique()) for key in units}
    return ", ".join(units[key].format(" or ".join(map(str, found))) for key, found in values.items() if found)


def timing_table(timings: DataFrame) -> DataFrame:
    """Return a table of strings with a row for each method and a column for each combination of network and input size.

    The methods in `CONTENDERS_ONLY_IN_CSV` are left out.

    A cell has the form `time ratio / time ratio without huge pages (peak memory of tensors in MiB)`. A time ratio is
    the time of a step divided by the time of a step of full fine-tuning. If there is no time without huge pages, the
    cell has only the first ratio. If a method failed or was not tried, its cell is `NO_VALUE`.
    """
    timings, cells = timings[~timings["method"].isin(CONTENDERS_ONLY_IN_CSV)], []
    for row in timings.itertuples():
        ratios = row.ratio, getattr(row, "ratio_without_huge_pages", nan)
        text = " / ".join(fixed(ratio, 2) for ratio in ratios if not isna(ratio))
        cells.append(NO_VALUE if row.error else f"{text} ({fixed(row.peak_bytes / 2**20, 0)})")
    networks = [f"{row.network}, batch {row.batch_size}, {row.image_size} px" for row in timings.itertuples()]
    cells = timings.assign(cell=cells, network=networks)
    table = cells.pivot_table(index="method", columns="network", values="cell", aggfunc="first", sort=False)
    return table.fillna(NO_VALUE)


def fixed(value: float, digits: int) -> str:
    """Format a number with `digits` decimals. A zero has no minus sign, and a missing value becomes `NO_VALUE`.

    >>> fixed(1234.56, 1), fixed(-0.04, 1)
    ('1,234.6', '0.0')
    """
    return NO_VALUE if isna(value) else f"{round(float(value), digits) + 0.0:,.{digits}f}"


def percent(fraction: float) -> str:
    """Format a fraction in percent with one decimal, without the percent sign."""
    return fixed(100 * fraction, 1)


def short(value: float) -> str:
    """Format a number with three digits, or with more if its integer part is longer. Numbers below 1 get two decimals.

    >>> short(1.234), short(12345.6)
    ('1.23', '12,346')
    """
    return fixed(value, max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 2)


def mean_and_deviation(mean: float, deviation: float) -> str:
    """Format the mean and the standard deviation of fractions in percent. A missing deviation is omitted."""
    return percent(mean) if isna(deviation) else f"{percent(mean)} ± {percent(deviation)}"


def interval(numbers: Iterable[int]) -> str:
    """Format the smallest and the largest element of `numbers`, or a single number if both are equal.

    >>> interval([3, 1, 2]), interval([4, 4])
    ('1 to 3', '4')
    """
    low, *_, high = sorted([*numbers] * 2)
    return f"{low}" if low == high else f"{low} to {high}"


def markdown_table(frame: DataFrame) -> str:
    """Format a frame of strings as a Markdown table. The index is left-aligned, and columns are right-aligned."""
    heads = [*(name or "" for name in frame.index.names), *frame.columns]
    marks = ["---"] * frame.index.nlevels + ["---:"] * len(frame.columns)
    rows = frame.reset_index().itertuples(index=False)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [heads, marks, *rows])
