"""Arithmetic: how many of a step's FLOPs the methods save, by two ways of counting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_edge.report.claims.claim import AGREED, NOT_AGREED, Claim, not_measured
from peft_edge.report.costs import LEAN, PLAIN, STORED, Cost
from peft_edge.report.figures.bars import BarPanel, save_grouped
from peft_edge.report.markdown import links, percent, picture, table
from peft_edge.report.rows import grouped
from peft_edge.report.savings import SOURCE_FAMILIES, Saving, files_of, savings, setting_of

CLAIMED = 0.95
"""What the source says."""

TOLERANCE = 0.05
"""How far from `CLAIMED` still agrees."""

TITLE = "Arithmetic: the FLOPs of an update"
SOURCE = f"Adapters cut the FLOPs of an update by up to {100 * CLAIMED:.0f} % on convolutional networks for the edge."
MEASURED = (
    "The FLOPs of convolutions and matrix products in the forward and the backward pass of a training step, analysed "
    "from shapes, against full fine-tuning: once with the accounting of the source study's published profiler, which "
    "counts the weight gradient of a grouped convolution as if it had one group, and once exactly. On stored features "
    "the frozen layers before the first adapter are not run at all, as in every epoch but the first."
)
_ADAPTERS = ("lora", "dora")
_COLUMNS: dict[str, tuple[str, str]] = {
    "as it is, source study's accounting": (PLAIN, "source-study"),
    "as it is, exact": (PLAIN, "exact"),
    "lean, exact": (LEAN, "exact"),
    "on stored features, exact": (STORED, "exact"),
}


def arithmetic_claim(costs: Sequence[Cost]) -> Claim:
    """Returns the section on FLOPs."""
    found = [one for one in savings(costs) if one.cost.family in SOURCE_FAMILIES]
    batch_sizes = grouped(found, lambda one: one.cost.batch_size)
    # FLOPs grow in proportion to the batch, so one size says it all: that with the most ways of counting.
    found = max(batch_sizes.values(), key=_coverage, default=[])
    cells = grouped(found, lambda one: (one.cost.network, one.cost.variant))
    adapters = [one for one in found if one.cost.family in _ADAPTERS and one.cost.kind != "transformer"]
    if not any(_column(one) == (PLAIN, "exact") for one in adapters):
        return Claim(
            title=TITLE,
            source=SOURCE,
            measured=MEASURED,
            found=not_measured("an adapter's step on a convolutional network", "configs/study/costs.yaml"),
        )
    return Claim(
        title=TITLE,
        source=SOURCE,
        measured=f"{MEASURED} Here: {setting_of(one.cost for one in found)}.",
        found=_sentence(adapters),
        more=[
            picture("flops", "Reduction of a step's forward and backward FLOPs, by both accountings"),
            f"Reduction of forward and backward FLOPs, in % of full fine-tuning's, batch {found[0].cost.batch_size}:",
            _table(cells),
        ],
        pictures={"flops": partial(_draw, found)},
    )


def _coverage(found: Sequence[Saving]) -> tuple[int, int]:
    return len({_column(one) for one in found}), len(found)


def _column(one: Saving) -> tuple[str, str]:
    return one.cost.form, one.cost.accounting


def _sentence(adapters: Sequence[Saving]) -> str:
    best = {column: max(members, key=lambda one: one.flops) for column, members in grouped(adapters, _column).items()}
    exact = best[PLAIN, "exact"]
    answer = AGREED if exact.flops >= CLAIMED - TOLERANCE else NOT_AGREED
    text = f"{answer}: counted exactly, the largest reduction by an adapter is {_largest(exact)}"
    if theirs := best.get((PLAIN, "source-study")):
        text += f"; by the source study's accounting it is {_largest(theirs)}"
    if stored := best.get((STORED, "exact")):
        text += f"; on stored features it truly is {_largest(stored)}"
    return f"{text}."


def _largest(one: Saving) -> str:
    return f"{percent(one.flops)} % ({one.cost.variant} on {one.cost.network})"


def _value(members: Sequence[Saving], column: tuple[str, str]) -> float | None:
    return next((one.flops for one in members if _column(one) == column), None)


def _table(cells: dict[tuple[str, str], list[Saving]]) -> str:
    rows = []
    for (network, variant), members in cells.items():
        values = [percent(_value(members, column)) for column in _COLUMNS.values()]
        rows.append([members[0].cost.kind, network, variant, *values, links(files_of(members))])
    return table(["kind", "network", "method", *_COLUMNS, "records"], rows, words=3)


def _draw(found: Sequence[Saving], path: Path) -> None:
    adapters = [one for one in found if one.cost.kind != "transformer" and one.cost.family in _ADAPTERS]
    networks = list(dict.fromkeys(one.cost.network for one in adapters))
    label = "fewer forward and backward FLOPs\nthan full fine-tuning [%]"
    panels = []
    for variant, members in grouped(adapters, lambda one: one.cost.variant).items():
        cells = grouped(members, lambda one: one.cost.network)
        groups = {}
        for name, column in _COLUMNS.items():
            values = [_value(cells.get(network, []), column) for network in networks]
            if set(values) != {None}:
                groups[name] = [None if value is None else 100 * value for value in values]
        panels.append(BarPanel(title=variant, label=label, groups=groups))
    save_grouped(networks, panels, path)
