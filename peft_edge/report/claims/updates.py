"""How the methods update: how far a kernel moves, and in how many directions, over the rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_edge.records import KernelChange
from peft_edge.report.claims.claim import NOT_MEASURED, Claim, not_measured, verdict
from peft_edge.report.figures.ranks import Range, RankPanel, save_over_rank
from peft_edge.report.markdown import NONE, fixed, links, picture, short, table
from peft_edge.report.rows import grouped
from peft_edge.report.runs import Run
from peft_edge.report.stats import quartiles

TITLE = "Update behaviour over the rank"
SOURCE = (
    "The update behaviour of LoRA, DoRA and GaLore is investigated over the rank. The abstract names no figure; what "
    "is tested here is that the rank decides in how many directions a kernel changes."
)
MEASURED = (
    "Of every convolution that the merged update has changed, read as a matrix (C_out, K): the Frobenius norm of the "
    "change over that of the kernel before (relative norm), and its squared Frobenius norm over its squared spectral "
    "norm (stable rank, from 1 to the rank of the change). Medians and quartiles are over the layers of all networks, "
    "tasks and seeds."
)
FIGURES = {
    "relative_norm": "relative norm of the change [share]",
    "stable_rank": "stable rank of the change [directions]",
}
"""What is shown of a change, with its unit."""


def updates_claim(runs: Sequence[Run]) -> Claim:
    """Returns the section on the changes of kernels."""
    changed = sorted((run for run in runs if run.record.train_info.changes), key=lambda run: run.order)
    if not changed:
        lacking = not_measured("the change of a kernel", "configs/study/embedded.yaml")
        return Claim(title=TITLE, source=SOURCE, measured=MEASURED, found=lacking)
    return Claim(
        title=TITLE,
        source=SOURCE,
        measured=MEASURED,
        found=_sentence(changed),
        more=[
            picture("updates", "Relative norm and stable rank of the changes over the rank: median and quartiles"),
            "Median [lower quartile, upper quartile]:",
            _table(changed),
        ],
        pictures={"updates": partial(_draw, changed)},
    )


def _layers(runs: Sequence[Run]) -> dict[str, list[KernelChange]]:
    """The changes by what is told apart: depthwise layers, and the others of each kind of network."""
    found: dict[str, list[KernelChange]] = {}
    for run in runs:
        for change in run.record.train_info.changes.values():
            kind = change.kind if change.kind in ("depthwise", "grouped") else "dense"
            found.setdefault(f"{kind} layers, {run.kind} networks", []).append(change)
    return dict(sorted(found.items(), key=lambda item: ("depthwise layers" in item[0], item[0])))


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    """The medians over dense layers; none if no dense layer has changed."""
    layers = _layers(runs)
    dense = [change for name, changes in layers.items() if name.startswith("dense") for change in changes]
    return {figure: quartiles([getattr(change, figure) for change in dense])[1] for figure in FIGURES} if dense else {}


def _sentence(runs: Sequence[Run]) -> str:
    parts, rises = [], []
    for method, members in grouped(runs, lambda run: run.method).items():
        ranks = {
            rank: medians
            for rank, of_rank in grouped(members, lambda run: run.lora_rank).items()
            if rank is not None and (medians := _medians(of_rank))
        }
        if len(ranks) < 2:
            continue
        low, high = min(ranks), max(ranks)
        rises.append(ranks[high]["stable_rank"] > ranks[low]["stable_rank"])
        parts.append(f"{method} from {_words(ranks[low])} at rank {low} to {_words(ranks[high])} at rank {high}")
    if not parts:
        return f"{NOT_MEASURED}: no method was run with several ranks."
    text = (
        f"{verdict(sum(rises), len(rises))}: the median stable rank of dense layers' changes rises with the rank for "
        f"{sum(rises)} of {len(rises)} methods: {', '.join(parts)}"
    )
    full = _medians([run for run in runs if run.method == "full"])
    return f"{text}; full fine-tuning's is {_words(full)}." if full else f"{text}."


def _words(medians: dict[str, float]) -> str:
    return f"{fixed(medians['stable_rank'], 1)} (relative norm {fixed(medians['relative_norm'], 2)})"


def _table(runs: Sequence[Run]) -> str:
    kinds = list(_layers(runs))
    rows = []
    for name, members in grouped(runs, lambda run: run.way).items():
        layers = _layers(members)
        cells = [_range(layers.get(kind, []), figure) for figure in FIGURES for kind in kinds]
        rows.append([name, *cells, links(run.file for run in members)])
    titles = [f"{figure.replace('_', ' ')}, {kind}" for figure in FIGURES for kind in kinds]
    return table(["method", *titles, "records"], rows)


def _range(changes: Sequence[KernelChange], figure: str) -> str:
    if not changes:
        return NONE
    lower, median, upper = map(short, quartiles([getattr(change, figure) for change in changes]))
    return f"{median} [{lower}, {upper}]"


def _draw(runs: Sequence[Run], path: Path) -> None:
    panels = []
    for figure, label in FIGURES.items():
        row = []
        for kind in _layers(runs):
            series: dict[str, dict[int | None, Range]] = {}
            for members in grouped(runs, lambda run: run.way).values():
                if changes := _layers(members).get(kind):
                    values = quartiles([getattr(change, figure) for change in changes])
                    series.setdefault(members[0].method, {})[members[0].lora_rank] = values
            row.append(RankPanel(title=kind.replace(", ", "\n"), label=label, series=series))
        panels.append(row)
    save_over_rank(panels, path)
