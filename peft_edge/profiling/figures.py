"""Costs as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_edge.files import written_whole
from peft_edge.records import StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which differ for every kind of colour vision, and hatches for print in black and white.
_MEMORY = {
    "activations": ("#0072B2", ""),
    "temporaries": ("#56B4E9", "///"),
    "parameters": ("#E69F00", ""),
    "buffers": ("#F0E442", "..."),
    "gradients": ("#D55E00", "\\\\\\"),
    "optimizer": ("#CC79A7", "xxx"),
}
_FLOPS = {
    "forward": ("#0072B2", ""),
    "backward": ("#E69F00", "///"),
    "elementwise_forward": ("#56B4E9", "..."),
    "elementwise_backward": ("#D55E00", "\\\\\\"),
    "optimizer": ("#CC79A7", "xxx"),
}
_UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
FORMATS = (".png", ".svg", ".pdf")


def save_cost_figure(costs: Mapping[str, StepProfile], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws memory at the peak by kind, and FLOPs by phase, as one stacked bar for each method.

    Args:
        costs: A step of each method, by the name that it gets in the picture.
        path: Where to; a .png, .svg or .pdf file.
        title: What was analysed.

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

    figure = Figure(figsize=(11, 1.9 + 0.36 * len(costs)), layout="constrained")
    figure.suptitle(title)
    memory, flops = figure.subplots(1, 2, sharey=True)
    _stack(memory, costs, "memory_{}_bytes", _MEMORY, 2**20)
    memory.set_xlabel("memory at the peak of a step [MiB]")
    _stack(flops, costs, "flops_{}", _FLOPS, 1e9)
    flops.set_xlabel("arithmetic of a step [GFLOP]")
    memory.invert_yaxis()
    # Without a date and random names in it, the same costs are the same file.
    with written_whole(path) as unfinished, rc_context({"svg.hashsalt": "peft-edge"}):
        figure.savefig(unfinished, format=path.suffix[1:], dpi=150, metadata=_UNDATED.get(path.suffix))


def _stack(
    axes: Axes, costs: Mapping[str, StepProfile], name: str, parts: Mapping[str, tuple[str, str]], unit: float
) -> None:
    left = [0.0] * len(costs)
    for part, (colour, hatch) in parts.items():
        widths = [(getattr(cost, name.format(part)) or 0) / unit for cost in costs.values()]
        label = part.replace("_", ", ")
        axes.barh(list(costs), widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
