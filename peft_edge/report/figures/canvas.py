"""How every figure is made: readable without colours, and the same file for the same records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from peft_edge.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
"""A picture to look at, and one to enlarge."""

# Okabe and Ito's colours, which differ for every kind of colour vision, but for their yellow, which is faint as a line.
# Markers tell apart what has the same colour, and everything in print without colours.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "H", "8")
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")
_UNDATED: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}}


class HasSeries(Protocol):
    """One pair of axes."""

    @property
    def series(self) -> Mapping[str, Any]:
        """What is drawn of each method."""


Panel = TypeVar("Panel", bound=HasSeries)


@contextmanager
def canvas(path: Path, *, size: tuple[float, float]) -> Iterator[Figure]:
    """Yields a figure, and saves it when the block ends.

    Args:
        path: Where to, without the ending; there is a file for each of `ENDINGS`.
        size: Width and height in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context, rcdefaults, rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "peft-edge[figures]"') from error

    with rc_context():
        # Neither the user's settings nor chance must have a part in it.
        rcdefaults()
        rcParams.update({"svg.hashsalt": "peft-edge", "font.size": 9})
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        for ending in ENDINGS:
            # Not with_suffix: there may be points in a name.
            figure.savefig(path.with_name(path.name + ending), dpi=150, metadata=_UNDATED[ending])


def save_grid(
    panels: Sequence[Sequence[Panel | None]],
    path: Path,
    draw: Callable[[Any, Panel, Mapping[str, Mapping[str, Any]]], None],
    *,
    panel_width: float,
    legend_columns: int,
) -> None:
    """Draws panels in rows and columns, and saves them; a method looks the same in all of them.

    Args:
        panels: Row by row, equally many in each; None leaves a place empty.
        path: See `canvas`.
        draw: Draws a panel into a pair of axes, with the style of each method.
        panel_width: In inches.
        legend_columns: Names beside one another in the legend.
    """
    marks = styles(list(dict.fromkeys(name for row in panels for panel in row if panel for name in panel.series)))
    with canvas(path, size=(0.6 + panel_width * len(panels[0]), 1.0 + 3.0 * len(panels))) as figure:
        grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey="row")
        for row, places in zip(panels, grid, strict=True):
            for panel, axes in zip(row, places, strict=True):
                if panel is None:
                    axes.set_axis_off()
                else:
                    draw(axes, panel, marks)
        legend_below(figure, list(grid.flat), columns=legend_columns)


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns a colour, a marker and a line for each method, as matplotlib's keyword arguments.

    A method of `METHODS` looks the same in every figure; others come after these.
    """
    others = [name for name in names if name not in METHODS]
    numbers = {name: list(METHODS).index(name) for name in names if name in METHODS}
    numbers |= {name: len(METHODS) + number for number, name in enumerate(others)}
    return {
        name: {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
            "markeredgecolor": "black",
            "markeredgewidth": 0.5,
        }
        for name, number in numbers.items()
    }


def fill(number: int) -> dict[str, Any]:
    """Returns a colour and a hatch for the bars with this number, as matplotlib's keyword arguments."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "hatch": _HATCHES[number % len(_HATCHES)],
        "edgecolor": "white",
    }


def plain(axes: Any) -> None:
    """Takes away the frame's upper and right side, and adds a grid behind the marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Sequence[Any], columns: int) -> None:
    """Draws one legend for all axes, each name once, below them."""
    handles: dict[str, Any] = {}
    for place in axes:
        for handle, name in zip(*place.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
