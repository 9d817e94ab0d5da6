"""Costs as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_edge.files import atomic_write
from peft_edge.records import StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which differ for every kind of colour vision, and hatches for print in black and white.
_STYLES = (
    ("#0072B2", ""),
    ("#E69F00", "///"),
    ("#56B4E9", "..."),
    ("#D55E00", "\\\\\\"),
    ("#CC79A7", "xxx"),
    ("#F0E442", "---"),
)
_MEMORY = ("activations", "temporaries", "parameters", "buffers", "gradients", "optimizer")
_FLOPS = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")
_UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Stacked bars, one for each name of a figure."""

    label: str
    """What the bars show, with its unit."""

    parts: Mapping[str, Sequence[float]]
    """The lengths of each part, one for each name."""

    spread: Sequence[tuple[float, float]] = ()
    """The lowest and the highest length of each bar, where there are several measurements of it."""

    line: float | None = None
    """A length to compare with."""


def memory_panel(costs: Sequence[StepProfile]) -> Panel:
    """Memory at the peak by kind."""
    return Panel(label="memory at the peak of a step [MiB]", parts=_parts(costs, "memory_{}_bytes", _MEMORY, 2**20))


def flops_panel(costs: Sequence[StepProfile]) -> Panel:
    """FLOPs by phase."""
    return Panel(label="arithmetic of a step [GFLOP]", parts=_parts(costs, "flops_{}", _FLOPS, 1e9))


def _parts(costs: Sequence[StepProfile], name: str, parts: Sequence[str], unit: float) -> dict[str, list[float]]:
    return {
        part.replace("_", ", "): [(getattr(cost, name.format(part)) or 0) / unit for cost in costs] for part in parts
    }


def save_cost_figure(costs: Mapping[str, StepProfile], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws memory at the peak by kind, and FLOPs by phase, as one stacked bar for each method; see `save_bars`.

    Args:
        costs: A step of each method, by the name that it gets in the picture.
        path: Where to.
        title: What was analysed.
    """
    steps = list(costs.values())
    save_bars(list(costs), [memory_panel(steps), flops_panel(steps)], path, title=title)


def save_bars(names: Sequence[str], panels: Sequence[Panel], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws panels of bars side by side.

    Args:
        names: Of the bars, from the top.
        panels: From the left.
        path: Where to; a .png, .svg or .pdf file.
        title: Stands above all.

    Raises:
        ValueError: The file has another ending.
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} has the ending {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "peft-edge[figures]"') from error

    figure = Figure(figsize=(1 + 5 * len(panels), 1.9 + 0.36 * len(names)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, panel in zip(axes, panels, strict=True):
        _draw(place, names, panel)
    axes[0].invert_yaxis()
    # Without a date and random names in it, the same bars are the same file.
    with atomic_write(path) as unfinished, rc_context({"svg.hashsalt": "peft-edge"}):
        figure.savefig(unfinished, format=path.suffix[1:], dpi=150, metadata=_UNDATED.get(path.suffix))


def _draw(axes: Axes, names: Sequence[str], panel: Panel) -> None:
    ends = [0.0] * len(names)
    for (part, widths), (colour, hatch) in zip(panel.parts.items(), _STYLES, strict=False):
        axes.barh(names, widths, left=ends, color=colour, hatch=hatch, edgecolor="white", label=part)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if panel.spread:
        # A bar is the sum of its parts, to rounding, and so may end a little outside of its spread.
        below, above = zip(
            *((max(end - low, 0), max(high - end, 0)) for end, (low, high) in zip(ends, panel.spread, strict=True)),
            strict=True,
        )
        axes.errorbar(ends, names, xerr=(below, above), fmt="none", ecolor="black", capsize=3)
    if panel.line is not None:
        axes.axvline(panel.line, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel(panel.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
