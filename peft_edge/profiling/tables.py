"""Costs as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from peft_edge.records import StepProfile

_PARAMETERS = {"M": 1e6, "k": 1e3, "": 1}
_FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1}
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_ARITHMETIC = {
    "forward": ["flops_forward"],
    "backward": ["flops_backward"],
    "elementwise": ["flops_elementwise_forward", "flops_elementwise_backward"],
    "optimizer": ["flops_optimizer"],
}
_TIME = {"forward": ["forward_s"], "backward": ["backward_s"], "optimizer": ["optimizer_s"]}
_MEMORY = {
    "peak": ["memory_peak_bytes"],
    "parameters": ["memory_parameters_bytes", "memory_buffers_bytes"],
    "gradients": ["memory_gradients_bytes"],
    "activations": ["memory_activations_bytes"],
    "temporaries": ["memory_temporaries_bytes"],
    "optimizer": ["memory_optimizer_bytes"],
}
# Two tables, one below the other, so that lines are not too long. The columns of a group, which are compared with one
# another, have one unit: the largest in which the largest of them is at least ten. Without units they are words.
_TABLES: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, Sequence[str]]]]] = {
    "arithmetic and time of a training step": (
        (_FLOPS, _ARITHMETIC),
        ({"ms": 1e-3}, _TIME),
        ({"per s": 1}, {"samples": ["samples_per_s"]}),
    ),
    "memory when it is at its peak, and the update": (
        ({}, {"peak in": ["memory_peak_phase"]}),
        (_BYTES, _MEMORY),
        (_PARAMETERS, {"trained": ["num_trainable_params"]}),
        (_BYTES, {"saved": ["adapter_bytes"]}),
    ),
}


def cost_table(costs: Mapping[str, StepProfile]) -> str:
    """Returns what steps cost as lines of text: arithmetic and time, and below memory at the peak and saved bytes.

    Columns of which nothing was measured are left out; in others, a dash stands for what was not.

    Args:
        costs: By the name that heads the line.
    """
    tables = []
    for caption, groups in _TABLES.items():
        columns = [column for units, group in groups for column in _columns(costs.values(), units, group)]
        if columns:
            tables.append(f"{caption}\n{text_table(list(zip(['', '', *costs], *columns, strict=True)))}")
    return "\n\n".join(tables)


def _columns(
    costs: Collection[StepProfile], units: Mapping[str, float], group: Mapping[str, Sequence[str]]
) -> Iterator[list[str]]:
    if not units:
        words = {title: [getattr(cost, name) for cost in costs] for title, (name,) in group.items()}
        yield from (["", title, *(word or "-" for word in column)] for title, column in words.items() if any(column))
        return
    sums = {title: [_sum(cost, names) for cost in costs] for title, names in group.items()}
    largest = max((value for values in sums.values() for value in values if value is not None), default=None)
    if largest is None:
        return
    unit, size = next(((unit, size) for unit, size in units.items() if largest >= 10 * size), [*units.items()][-1])
    for title, values in sums.items():
        yield [unit, title, *("-" if value is None else _short(value / size) for value in values)]


def profile_table(rows: Sequence[StepProfile]) -> str:
    """Returns `cost_table` for the rows of a record: a process's step, and below it the layers of each LoRA rank."""
    return cost_table({_name(row): row for row in rows})


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns lines of text, in which each column of cells is as wide as it must be, and ends at its right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _sum(cost: StepProfile, names: Sequence[str]) -> float | None:
    known = [value for value in (getattr(cost, name) for name in names) if value is not None]
    return sum(known) if known else None


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value else "0"


def _name(row: StepProfile) -> str:
    return f"process {row.process_index}" + (f", layers of rank {row.lora_rank}" if row.scope == "layers" else "")
