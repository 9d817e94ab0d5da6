"""Draw the memory, FLOPs and times of steps as stacked bars."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft_edge.files import atomic_write, requires_extra
from peft_edge.records import StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
# The colour-blind safe palette of Okabe and Ito, and hatches for black-and-white print.
_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")
_MEMORY = ("activations", "temporaries", "parameters", "buffers", "gradients", "optimizer")
_FLOPS = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StackedBars:
    """The data of one panel of a figure. The panel has one stacked bar for each element of `names` in `save_bars`."""

    label: str
    """Label of the horizontal axis: the quantity with its unit."""
    parts: Mapping[str, Sequence[float]]
    """A dict from the label of each part to its lengths, one for each bar. Only the first six parts are drawn."""
    spread: Sequence[tuple[float, float]] = ()
    """The lowest and the highest measured length of each bar, drawn as error bars. An empty `spread` draws none."""
    line: float | None = None
    """Position of a dashed reference line. If it is None, no line is drawn."""
    marks: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Diamonds on the bars. Each key is a label in the legend. Its value lists the position of a diamond on each bar.

    The position is None for a bar without this diamond."""
    number_format: str = ""
    """The format of the total length that is printed at the end of each bar. If it is empty, no length is printed."""


def save_cost_figure(costs: Mapping[str, StepProfile], path: str | os.PathLike[str], *, title: str) -> None:
    """Save a figure with two panels: peak memory by kind of tensor, and FLOPs by phase.

    Both panels have a bar for each name in `costs`. See `save_bars` for the file formats and the errors.
    """
    steps = list(costs.values())
    flops = StackedBars(label="arithmetic of a step [GFLOP]", parts=_parts(steps, "flops_{}", _FLOPS, 1e9))
    save_bars(list(costs), [_memory_panel(steps), flops], path, title=title)


def _memory_panel(costs: Sequence[StepProfile]) -> StackedBars:
    """Return a panel of the peak memory in MiB by kind of tensor, with a bar for each element of `costs`."""
    parts = _parts(costs, "memory_{}_bytes", _MEMORY, 2**20)
    return StackedBars(label="memory at the peak of a step [MiB]", parts=parts)


def _parts(costs: Sequence[StepProfile], name: str, parts: Sequence[str], unit: float) -> dict[str, list[float]]:
    sizes = {part: [getattr(cost, name.format(part)) or 0 for cost in costs] for part in parts}
    return {part.replace("_", ", "): [size / unit for size in sizes[part]] for part in parts}


def save_bars(names: Sequence[str], panels: Sequence[StackedBars], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw `panels` side by side, and save the figure to `path`. The bar of the first name is at the top.

    The same arguments give identical files.

    Raises:
        ValueError: If the path does not end in .png, .svg or .pdf.
        ImportError: If matplotlib is missing.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} has the ending {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    with requires_extra("report"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    # The names are to the left of the first panel, and need about 0.085 inches for each letter.
    size = 0.085 * max(map(len, names)) + 4.5 * len(panels), 1.9 + 0.3 * len(names)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, panel in zip(axes, panels, strict=True):
        _draw(place, names, panel)
    axes[0].invert_yaxis()
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    with atomic_write(path) as unfinished, rc_context({"svg.hashsalt": "peft-edge"}):
        figure.savefig(unfinished, format=path.suffix[1:], dpi=150, metadata=undated)


def _draw(axes: Axes, names: Sequence[str], panel: StackedBars) -> None:
    ends = [0.0] * len(names)
    for (part, widths), colour, hatch in zip(panel.parts.items(), _COLOURS, _HATCHES, strict=False):
        # The edge colour is also the colour of the hatch. The edge has no width, because a visible edge would cover
        # thin parts.
        axes.barh(names, widths, left=ends, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=part)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    outer = list(ends)
    if panel.spread:
        # Rounding can put the end of a bar outside its spread, but the lengths of error bars must not be negative.
        below = [max(end - low, 0) for end, (low, _) in zip(ends, panel.spread, strict=True)]
        above = [max(high - end, 0) for end, (_, high) in zip(ends, panel.spread, strict=True)]
        axes.errorbar(ends, names, xerr=(below, above), fmt="none", ecolor="black", elinewidth=1, capsize=2)
        outer = [end + more for end, more in zip(ends, above, strict=True)]
    for label, positions in panel.marks.items():
        shown = {name: x for x, name in zip(positions, names, strict=True) if x is not None}
        axes.scatter(
            list(shown.values()), list(shown), marker="D", s=18, c="white", edgecolors="black", zorder=3, label=label
        )
        outer = [max(end, x or 0) for end, x in zip(outer, positions, strict=True)]
    if panel.number_format:
        for end, place, name in zip(ends, outer, names, strict=True):
            if end:
                text = format(end, panel.number_format)
                axes.annotate(text, (place, name), (7, 0), textcoords="offset points", va="center", fontsize=8)
    if panel.line is not None:
        axes.axvline(panel.line, color="black", linewidth=0.8, linestyle="--")
    axes.margins(x=0.1, y=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel(panel.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
