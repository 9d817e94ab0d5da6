"""Figures of bars: what a peak is made of, and reductions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_edge.profiling.figures import StackedBars
from peft_edge.report.figures.canvas import canvas, fill, legend_below, plain


@dataclass(frozen=True, kw_only=True)
class BarPanel:
    """One pair of axes."""

    title: str
    """What is shown."""

    label: str
    """The horizontal axis, with its unit."""

    groups: Mapping[str, Sequence[float | None]]
    """A bar in every row, by what tells the bars of a row apart; None where there is no record."""


def save_stacked(names: Sequence[str], panel: StackedBars, path: Path, *, title: str) -> None:
    """Draws stacked bars with their spread.

    Args:
        names: Of the bars, from the top.
        panel: Their parts.
        path: See `canvas`.
        title: Stands above.
    """
    with canvas(path, size=(8, 1.5 + 0.27 * len(names))) as figure:
        axes = figure.subplots()
        plain(axes)
        ends = [0.0] * len(names)
        for number, (part, lengths) in enumerate(panel.parts.items()):
            axes.barh(names, lengths, left=ends, label=part, **fill(number))
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for place, (low, high) in enumerate(panel.spread):
            axes.plot([low, high], [place, place], color="black", marker="|", markersize=7, linewidth=1.2)
        if panel.line is not None:
            axes.axvline(panel.line, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel=panel.label)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        legend_below(figure, [axes], columns=len(panel.parts))


def save_grouped(names: Sequence[str], panels: Sequence[BarPanel], path: Path) -> None:
    """Draws bars beside one another. A group looks the same in every panel.

    Args:
        names: Of the rows, from the top.
        panels: From the left.
        path: See `canvas`.
    """
    groups = list(dict.fromkeys(name for panel in panels for name in panel.groups))
    with canvas(path, size=(1.8 + 3.6 * len(panels), 1.4 + 0.17 * len(groups) * len(names))) as figure:
        row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel, groups)
        row[0].set_yticks(range(len(names)), names)
        row[0].invert_yaxis()
        legend_below(figure, row, columns=2)


def _draw(axes: Any, panel: BarPanel, groups: Sequence[str]) -> None:
    plain(axes)
    height = 0.8 / len(groups)
    first = -height * (len(panel.groups) - 1) / 2
    for number, (name, lengths) in enumerate(panel.groups.items()):
        places = [row + first + height * number for row in range(len(lengths))]
        known = [length or 0 for length in lengths]
        axes.barh(places, known, height=height, label=name, **fill(groups.index(name)))
        for place, length in zip(places, lengths, strict=True):
            # A bar of no length would say zero.
            text = "no record" if length is None else f"{round(length)}"
            point = (max(length or 0, 0), place)
            axes.annotate(text, point, xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12, y=0.02)
    axes.set(title=panel.title, xlabel=panel.label)
