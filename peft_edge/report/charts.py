"""Draw the figures of the report. The figures are readable without colours, and the same data give identical files.

Every `draw_...` function adds `.png` and `.svg` to its argument `path` and writes both files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandas import DataFrame

from peft_edge.files import requires_extra
from peft_edge.methods import METHODS
from peft_edge.report.frames import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of Okabe and Ito, without yellow, which is too faint for lines.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
# Markers and lines distinguish methods with the same colour. In black and white, hatches distinguish bars.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "H", "8")
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")

Style = dict[str, Any]
"""Keyword arguments of matplotlib's drawing functions."""


@dataclass(frozen=True, kw_only=True)
class Subplot:
    """The data and the labels of one subplot of a grid."""

    title: str
    x_label: str
    y_label: str
    data: DataFrame
    """`draw_scatter` needs the columns `method`, `x` and `y`.

    `draw_over_rank` needs the columns `method`, `lora_rank`, `low`, `middle` and `high`.
    """


DrawSubplot = Callable[["Axes", DataFrame, Mapping[str, Style]], None]
Grid = Sequence[Sequence[Subplot | None]]
"""Rows of subplots. All rows must have the same length. None leaves the place of a subplot empty."""


def draw_over_rank(grid: Grid, path: Path) -> None:
    """Draw a line with error bars for each method in each subplot.

    The line shows the column `middle` of the subplot's data over the column `lora_rank`. The error bars extend from the
    column `low` to the column `high`. Methods without a rank are points on the left.
    """
    _draw_grid(grid, path, _draw_ranks, panel_width=3.6, legend_columns=min(6, 2 * len(grid[0])))


def draw_scatter(grid: Grid, path: Path, *, with_front: bool = False) -> None:
    """Draw a point for each row of a subplot's data, and a thin line through the points of each method.

    The markers of one method grow in the order of the rows. `with_front` adds the Pareto front, a stepped line through
    the points that no other point dominates. A smaller `x` and a larger `y` are better.
    """
    draw = partial(_draw_points, with_front=with_front)
    _draw_grid(grid, path, draw, panel_width=4.6 if len(grid[0]) < 3 else 3.6, legend_columns=5)


def draw_stacked_bars(parts: DataFrame, ranges: DataFrame, path: Path, *, title: str, label: str) -> None:
    """Draw a horizontal stacked bar for each row of `parts`, with the first row at the top.

    Each column of `parts` is one part of the bars, and its values are the lengths of this part. `ranges` has a row for
    each bar, in the same order. Its columns `min` and `max` are the range of the total length of the bar. A black line
    shows this range. A dashed line marks the length 100. `label` is the quantity on the horizontal axis, with its unit.
    """
    with figure_file(path, size=(8, 1.5 + 0.27 * len(parts))) as figure:
        axes = figure.subplots()
        _set_frame(axes)
        ends = 0.0
        for number, part in enumerate(parts):
            axes.barh(parts.index.tolist(), parts[part].tolist(), left=ends, label=part, **_bar_style(number))
            ends = ends + parts[part].to_numpy()
        for place, (low, high) in enumerate(ranges[["min", "max"]].to_numpy()):
            axes.plot([low, high], [place, place], color="black", marker="|", markersize=7, linewidth=1.2)
        axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel=label)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        _add_legend(figure, [axes], columns=len(parts.columns))


def draw_grouped_bars(panels: Mapping[str, DataFrame], path: Path, *, label: str) -> None:
    """Draw a panel of horizontal bars for each title in `panels`.

    Each frame in `panels` holds the lengths of the bars in one panel. It has a row for each name on the vertical axis,
    with the first row at the top, and a column for each style of bars. All frames must have the same rows. Columns with
    the same name have the same style in all panels. A missing length is shown as "no record". `label` is the quantity
    on the horizontal axis, with its unit.
    """
    groups = list(dict.fromkeys(group for panel in panels.values() for group in panel))
    names = next(iter(panels.values())).index.tolist()
    with figure_file(path, size=(1.8 + 3.6 * len(panels), 1.4 + 0.17 * len(groups) * len(names))) as figure:
        row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (title, lengths) in zip(row, panels.items(), strict=True):
            _draw_bar_groups(axes, lengths, groups)
            axes.set(title=title, xlabel=label)
        row[0].set_yticks(range(len(names)), names)
        row[0].invert_yaxis()
        _add_legend(figure, row, columns=2)


@contextmanager
def figure_file(path: Path, *, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure, and save the figure to `<path>.png` and `<path>.svg` at the end of the block.

    `size` is the width and height in inches. If the block raises an error, no file is written. The files do not depend
    on the user's matplotlib settings or the date.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with requires_extra("report"):
        from matplotlib import rc_context, rcdefaults, rcParams
        from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()
        rcParams.update({"svg.hashsalt": "peft-edge", "font.size": 9})
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        # `with_suffix` is not used, because it would replace the part of the name after a dot.
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)
        figure.savefig(path.with_name(f"{path.name}.svg"), dpi=150, metadata={"Date": None})


def method_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a dict from the names of methods to their colours, markers and lines.

    A key of `METHODS` has the same style in every figure.
    """
    order = [*METHODS, *(name for name in names if name not in METHODS)]
    return {
        name: {
            "color": _COLOURS[order.index(name) % len(_COLOURS)],
            "marker": _MARKERS[order.index(name) % len(_MARKERS)],
            "linestyle": _LINES[order.index(name) % len(_LINES)],
            "markeredgecolor": "black",
            "markeredgewidth": 0.5,
        }
        for name in names
    }


def _draw_grid(grid: Grid, path: Path, draw: DrawSubplot, *, panel_width: float, legend_columns: int) -> None:
    panels = [panel for row in grid for panel in row if panel is not None]
    styles = method_styles(list(dict.fromkeys(name for panel in panels for name in panel.data["method"])))
    with figure_file(path, size=(0.6 + panel_width * len(grid[0]), 1.0 + 3.0 * len(grid))) as figure:
        places = figure.subplots(len(grid), len(grid[0]), squeeze=False, sharey="row")
        for row, row_axes in zip(grid, places, strict=True):
            for panel, axes in zip(row, row_axes, strict=True):
                if panel is None:
                    axes.set_axis_off()
                    continue
                _set_frame(axes)
                axes.tick_params(labelleft=True)
                draw(axes, panel.data, styles)
                axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        _add_legend(figure, list(places.flat), columns=legend_columns)


def _draw_ranks(axes: Axes, data: DataFrame, styles: Mapping[str, Style]) -> None:
    ranks = sorted(data["lora_rank"].dropna().unique())
    methods = dict(list(data.groupby("method", sort=False)))
    ranked = [name for name, points in methods.items() if points["lora_rank"].notna().any()]
    others = [name for name in methods if name not in ranked]
    for number, name in enumerate(ranked):
        # With an offset, error bars do not hide each other.
        offset = 0.1 * (number - (len(ranked) - 1) / 2)
        points = methods[name].dropna(subset="lora_rank")
        _draw_ranges(axes, [ranks.index(rank) + offset for rank in points["lora_rank"]], points, name, styles[name])
    for number, name in enumerate(others):
        _draw_ranges(axes, [-0.8 - 0.2 * (len(others) - 1 - number)], methods[name], name, styles[name])
    ticks: dict[float, str] = {place: str(rank) for place, rank in enumerate(ranks)}
    if others:
        ticks[-0.8 - 0.1 * (len(others) - 1)] = "no rank"
        axes.axvline(-0.5, color="0.6", linewidth=0.8)
    axes.set_xticks(list(ticks), list(ticks.values()))


def _draw_ranges(axes: Axes, places: Sequence[float], points: DataFrame, name: str, style: Style) -> None:
    low, middle, high = points[["low", "middle", "high"]].to_numpy().T
    errors = [(middle - low).tolist(), (high - middle).tolist()]  # matplotlib 3.10 warns of arrays with one value
    axes.errorbar(places, middle, yerr=errors, label=name, markersize=6, linewidth=1.2, elinewidth=0.8, **style)


def _draw_points(axes: Axes, data: DataFrame, styles: Mapping[str, Style], *, with_front: bool) -> None:
    if with_front:
        points = data[["x", "y"]].drop_duplicates()
        front = points[pareto_front((points * [1, -1]).to_numpy())].sort_values(["x", "y"]).to_numpy()
        axes.step(*front.T, where="post", color="black", linewidth=2.2, alpha=0.45, label="Pareto front")
    for name, points in data.groupby("method", sort=False):
        style = styles[name]
        axes.plot(points["x"].to_numpy(), points["y"].to_numpy(), **{**style, "marker": ""}, linewidth=0.8)
        for number, (x, y) in enumerate(points[["x", "y"]].to_numpy()):
            label = name if number == 0 else None
            axes.plot(x, y, **{**style, "linestyle": "none"}, markersize=5 + 1.5 * number, label=label)


def _draw_bar_groups(axes: Axes, lengths: DataFrame, groups: Sequence[str]) -> None:
    _set_frame(axes)
    height = 0.8 / len(groups)
    first = -height * (len(lengths.columns) - 1) / 2
    for number, group in enumerate(lengths):
        places = [row + first + height * number for row in range(len(lengths))]
        known = lengths[group].fillna(0).tolist()
        axes.barh(places, known, height=height, label=group, **_bar_style(groups.index(group)))
        for place, length, is_missing in zip(places, known, lengths[group].isna(), strict=True):
            # Without the text, a missing bar would look like a bar of length 0.
            text = "no record" if is_missing else f"{round(length)}"
            point = (max(length, 0), place)
            axes.annotate(text, point, xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12, y=0.02)


def _bar_style(number: int) -> Style:
    colour, hatch = _COLOURS[number % len(_COLOURS)], _HATCHES[number % len(_HATCHES)]
    return {"color": colour, "hatch": hatch, "edgecolor": "white"}


def _set_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _add_legend(figure: Figure, axes: Sequence[Axes], *, columns: int) -> None:
    """Add a common legend below all axes, with each name once."""
    handles: dict[str, Any] = {}
    for place in axes:
        for handle, name in zip(*place.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
