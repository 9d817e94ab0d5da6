"""Figures over the rank: methods with a rank as lines, and the others beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_edge.report.figures.canvas import plain, save_grid

Range = tuple[float, float, float]
"""The lower end, the middle and the upper end."""


@dataclass(frozen=True, kw_only=True)
class RankPanel:
    """One pair of axes."""

    title: str
    """What is shown."""

    label: str
    """The vertical axis, with its unit."""

    series: Mapping[str, Mapping[int | None, Range]]
    """Of each method, the values by rank; a method without a rank has one, under None."""


def save_over_rank(panels: Sequence[Sequence[RankPanel | None]], path: Path) -> None:
    """Draws panels in rows and columns.

    Args:
        panels: Row by row, equally many in each; None leaves a place empty.
        path: See `canvas`.
    """
    save_grid(panels, path, _draw, panel_width=3.6, legend_columns=min(6, 2 * len(panels[0])))


def _draw(axes: Any, panel: RankPanel, marks: Mapping[str, Mapping[str, Any]]) -> None:
    ranks = sorted({rank for values in panel.series.values() for rank in values if rank is not None})
    ranked = [name for name, values in panel.series.items() if set(values) != {None}]
    others = [name for name in panel.series if name not in ranked]
    for number, name in enumerate(ranked):
        # Side by side, or error bars would hide one another.
        offset = 0.1 * (number - (len(ranked) - 1) / 2)
        places = [ranks.index(rank) + offset for rank in panel.series[name] if rank is not None]
        _points(axes, places, [values for rank, values in panel.series[name].items() if rank is not None], name, marks)
    for number, name in enumerate(others):
        _points(axes, [-0.8 - 0.2 * (len(others) - 1 - number)], [panel.series[name][None]], name, marks)
    ticks: dict[float, str] = {place: str(rank) for place, rank in enumerate(ranks)}
    if others:
        ticks[-0.8 - 0.1 * (len(others) - 1)] = "no rank"
        axes.axvline(-0.5, color="0.6", linewidth=0.8)
    plain(axes)
    axes.tick_params(labelleft=True)
    axes.set(title=panel.title, xlabel="rank", ylabel=panel.label)
    axes.set_xticks(list(ticks), list(ticks.values()))


def _points(
    axes: Any, places: Sequence[float], values: Sequence[Range], name: str, marks: Mapping[str, Mapping[str, Any]]
) -> None:
    lower, middle, upper = zip(*values, strict=True)
    below = [centre - low for centre, low in zip(middle, lower, strict=True)]
    above = [high - centre for centre, high in zip(middle, upper, strict=True)]
    axes.errorbar(
        places, middle, yerr=(below, above), label=name, markersize=6, linewidth=1.2, elinewidth=0.8, **marks[name]
    )
