"""Figures of one thing against another: a point for each method and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_edge.report.figures.canvas import plain, save_grid
from peft_edge.report.stats import pareto


@dataclass(frozen=True, kw_only=True)
class ScatterPanel:
    """One pair of axes."""

    title: str
    """What is shown."""

    across: str
    """The horizontal axis, with its unit."""

    up: str
    """The vertical axis, with its unit."""

    series: Mapping[str, Sequence[tuple[float, float]]]
    """Of each method, the points, by rising rank."""

    has_front: bool = False
    """Whether small is good across and large is good up, and the Pareto front of that is drawn."""


def save_scatter(panels: Sequence[Sequence[ScatterPanel | None]], path: Path) -> None:
    """Draws panels in rows and columns. Markers of a method grow with its rank.

    Args:
        panels: Row by row, equally many in each; None leaves a place empty.
        path: See `canvas`.
    """
    save_grid(panels, path, _draw, panel_width=4.6 if len(panels[0]) < 3 else 3.6, legend_columns=5)


def _draw(axes: Any, panel: ScatterPanel, marks: Mapping[str, Mapping[str, Any]]) -> None:
    plain(axes)
    axes.tick_params(labelleft=True)
    if panel.has_front:
        _draw_front(axes, [point for points in panel.series.values() for point in points])
    for name, points in panel.series.items():
        style = marks[name]
        axes.plot(*zip(*points, strict=True), **{**style, "marker": ""}, linewidth=0.8)
        for number, (x, y) in enumerate(points):
            size = 5 + 1.5 * number
            axes.plot(x, y, **{**style, "linestyle": "none"}, markersize=size, label=name if number == 0 else None)
    axes.set(title=panel.title, xlabel=panel.across, ylabel=panel.up)


def _draw_front(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    chosen = pareto([(x, -y) for x, y in points])
    front = sorted({point for point, is_best in zip(points, chosen, strict=True) if is_best})
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=2.2, alpha=0.45, label="Pareto front")
