"""Memory: how much the methods save on depthwise-separable networks, against language models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_edge.profiling.figures import StackedBars
from peft_edge.report.claims.claim import AGREED, IN_PART, NOT_AGREED, Claim, Picture, not_measured
from peft_edge.report.costs import PLAIN, Cost
from peft_edge.report.figures.bars import save_stacked
from peft_edge.report.markdown import NONE, fixed, links, percent, picture, table
from peft_edge.report.rows import KINDS, grouped
from peft_edge.report.savings import SOURCE_FAMILIES, Saving, files_of, savings, setting_of

TITLE = "Memory: depthwise-separable networks against language models"
SOURCE = (
    "LoRA, DoRA and GaLore are only half as memory-efficient on depthwise-separable convolutional networks as on large "
    "language models."
)
MEASURED = (
    "The bytes of all tensors that are alive at the peak of a training step, analysed from shapes: full fine-tuning, "
    "PEFT's own LoRA and DoRA, and GaLore, as autograd runs them, with AdamW. The saving is 1 - peak / peak of full "
    "fine-tuning of the same network at the same batch size; a mean is over networks. Lean training is the same step "
    "with `prepare_model_for_lean_training`; on stored features it is that of an epoch after the first."
)
NEAR_HALF = (0.25, 0.75)
"""Nearer to a half than to nothing or to all."""

_GRID = "configs/study/costs.yaml"
_PARTS = ("activations", "temporaries", "parameters", "buffers", "gradients", "optimizer")


def memory_claim(costs: Sequence[Cost]) -> Claim:
    """Returns the section on memory."""
    found = savings([cost for cost in costs if cost.accounting == "exact"])
    plain = [saving for saving in found if saving.cost.form == PLAIN and saving.cost.family in SOURCE_FAMILIES]
    kinds = {saving.cost.kind for saving in plain}
    if not {"depthwise", "transformer"} <= kinds:
        lacking = " and of ".join(sorted({"depthwise", "transformer"} - kinds))
        return Claim(
            title=TITLE,
            source=SOURCE,
            measured=MEASURED,
            found=not_measured(f"a step of {lacking} networks with {', '.join(SOURCE_FAMILIES)}", _GRID),
        )
    pictures: dict[str, Picture] = {}
    texts = []
    for batch_size, members in grouped(sorted(found, key=_batch_size), _batch_size).items():
        name = f"memory_batch_{batch_size}"
        pictures[name] = partial(_draw, members, batch_size)
        texts.append(picture(name, f"Memory at the peak by kind of bytes, batch {batch_size}: means over networks"))
    return Claim(
        title=TITLE,
        source=SOURCE,
        measured=f"{MEASURED} Here: {setting_of(one.cost for one in found)}.",
        found=_sentence(plain),
        more=[_others(found), _means(found), *texts, _by_kind(found), _by_network(found)],
        pictures=pictures,
    )


def _batch_size(saving: Saving) -> int:
    return saving.cost.batch_size


def _method(saving: Saving) -> str:
    return saving.cost.method


def _mean(found: Sequence[Saving], kind: str) -> float | None:
    return statistics.fmean(values) if (values := [one.memory for one in found if one.cost.kind == kind]) else None


def _ratio(found: Sequence[Saving]) -> float | None:
    depthwise, transformer = _mean(found, "depthwise"), _mean(found, "transformer")
    # Of nothing saved there is no half.
    return None if depthwise is None or transformer is None or transformer <= 0 else depthwise / transformer


def _sentence(plain: Sequence[Saving]) -> str:
    pairs: dict[int, list[str]] = {}
    less = near = 0
    groups = grouped(sorted(plain, key=_batch_size), lambda one: (one.cost.batch_size, one.cost.variant))
    for (batch_size, variant), members in groups.items():
        depthwise, transformer = _mean(members, "depthwise"), _mean(members, "transformer")
        if depthwise is None or transformer is None:
            continue
        ratio = _ratio(members)
        less += depthwise < transformer
        near += ratio is not None and NEAR_HALF[0] <= ratio <= NEAR_HALF[1]
        text = f"{variant} {percent(depthwise)} % against {percent(transformer)} %"
        pairs.setdefault(batch_size, []).append(text)
    count = sum(map(len, pairs.values()))
    answer = AGREED if near == count else IN_PART if less else NOT_AGREED
    details = "; ".join(f"batch {batch_size}: {', '.join(texts)}" for batch_size, texts in pairs.items())
    return (
        f"{answer}: of {count} pairs of method and batch size, {less} save less on depthwise-separable networks than "
        f"on language models, and {near} about half as much ({details})."
    )


def _others(found: Sequence[Saving]) -> str:
    """The same after lean training, and on stored features."""
    parts = []
    for batch_size, members in grouped(sorted(found, key=_batch_size), _batch_size).items():
        means = [
            f"{method} {percent(mean)} %"
            for method, of_one in grouped(members, _method).items()
            if of_one[0].cost.form != PLAIN and (mean := _mean(of_one, "depthwise")) is not None
        ]
        if means:
            parts.append(f"at batch {batch_size} {', '.join(means)}")
    if not parts:
        return "Lean training was not analysed."
    return f"Trained otherwise, the same methods save on depthwise-separable networks, on average: {'; '.join(parts)}."


def _means(found: Sequence[Saving]) -> str:
    rows = []
    for (batch_size, method), members in grouped(found, lambda one: (one.cost.batch_size, one.cost.method)).items():
        means = [percent(_mean(members, kind)) for kind in KINDS]
        ratio = _ratio(members)
        rows.append([method, str(batch_size), *means, fixed(ratio, 2), links(files_of(members))])
    head = ["method", "batch", *(f"{kind} [%]" for kind in KINDS), "depthwise / transformer", "records"]
    return "Mean saving of peak memory by kind of network:\n\n" + table(head, sorted(rows, key=lambda row: int(row[1])))


def _by_kind(found: Sequence[Saving]) -> str:
    rows = []
    groups = grouped(found, lambda one: (one.cost.kind, one.cost.batch_size, one.cost.method))
    for (kind, batch_size, method), members in groups.items():
        shares = [percent(statistics.fmean(_share(one.cost, one.full, part) for one in members)) for part in _PARTS]
        peak = percent(statistics.fmean(1 - one.memory for one in members))
        rows.append([kind, method, str(batch_size), peak, *shares, links(files_of(members))])
    head = ["kind", "method", "batch", "peak", *_PARTS, "records"]
    return "What the peak is made of, in % of full fine-tuning's peak, mean over networks:\n\n" + table(
        head, rows, words=2
    )


def _by_network(found: Sequence[Saving]) -> str:
    methods = list(dict.fromkeys(map(_method, found)))
    rows = []
    for (network, batch_size), members in grouped(found, lambda one: (one.cost.network, one.cost.batch_size)).items():
        saved = {_method(one): percent(one.memory) for one in members}
        full = members[0].full
        cells = [full.kind, network, str(batch_size), fixed(full.peak / 2**20, 0)]
        rows.append([*cells, *(saved.get(method, NONE) for method in methods), links(files_of(members))])
    head = ["kind", "network", "batch", "full [MiB]", *methods, "records"]
    return "Saving of peak memory of every network, in %:\n\n" + table(head, rows, words=2)


def _share(cost: Cost, full: Cost, part: str) -> float:
    return (getattr(cost.record.profile, f"memory_{part}_bytes") or 0) / full.peak


def _draw(found: Sequence[Saving], batch_size: int, path: Path) -> None:
    rows: dict[str, list[tuple[Cost, Cost]]] = {}
    for kind, members in grouped(found, lambda one: one.cost.kind).items():
        references = {one.full.file: one.full for one in members}
        rows[f"full (as it is), {kind}"] = [(full, full) for full in references.values()]
    # The kinds of networks beside one another.
    for method, members in grouped(found, _method).items():
        for kind, of_kind in grouped(members, lambda one: one.cost.kind).items():
            rows[f"{method}, {kind}"] = [(one.cost, one.full) for one in of_kind]
    peaks = [[100 * cost.peak / full.peak for cost, full in pairs] for pairs in rows.values()]
    panel = StackedBars(
        label="mean peak, and its range over networks [% of full fine-tuning's]",
        parts={
            part: [100 * statistics.fmean(_share(cost, full, part) for cost, full in pairs) for pairs in rows.values()]
            for part in _PARTS
        },
        spread=[(min(of_row), max(of_row)) for of_row in peaks],
        line=100,
    )
    save_stacked(list(rows), panel, path, title=f"Memory of a training step, batch {batch_size}")
