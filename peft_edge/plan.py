"""A budget: amounts with units, and what exceeds them.

What records of runs say about the accuracy of ways to train.

The search: for every method, placement and rank, the mildest setting that fits a budget.

A plan as text.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from peft_edge.methods import METHODS, find_method
from peft_edge.profiling.analysis import analyse
from peft_edge.profiling.tables import text_table
from peft_edge.records import Record, StepProfile, read_archive
from peft_edge.roles import ROLES, modules_with_role

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FLOPS = {"FLOP": 1, "MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
"""The units of amounts, and how many bytes or operations they are."""

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a training step, and the update that is shipped, may take; None for what does not matter."""

    memory_bytes: int | None = None
    """Bytes of tensors at the peak of a step: weights, activations, gradients, the optimizer's state."""

    flops: int | None = None
    """All arithmetic of a step."""

    adapter_bytes: int | None = None
    """Bytes of the saved update."""

    def excess(self, profile: StepProfile) -> list[str]:
        """Says what of the budget a step exceeds, and by how much; nothing if it fits."""
        kinds = [
            ("memory", self.memory_bytes, profile.memory_peak_bytes or 0, "MiB", 2**20),
            ("arithmetic", self.flops, step_flops(profile), "GFLOP", 10**9),
            ("saved update", self.adapter_bytes, profile.adapter_bytes or 0, "KiB", 2**10),
        ]
        return [
            f"{name} {found / size:,.1f} {unit}, {(found - most) / size:,.1f} over"
            for name, most, found, unit, size in kinds
            if most is not None and found > most
        ]

    def __str__(self) -> str:
        amounts = [
            (self.memory_bytes, "memory", "MiB", 2**20),
            (self.flops, "arithmetic", "GFLOP", 10**9),
            (self.adapter_bytes, "saved update", "KiB", 2**10),
        ]
        limits = [f"{name} {most / size:,g} {unit}" for most, name, unit, size in amounts if most is not None]
        return f"at most {', '.join(limits)}" if limits else "no limit"


def step_flops(profile: StepProfile) -> int:
    """All arithmetic of a step: products and elementwise, forward, backward and the optimizer's."""
    parts = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")
    return sum(getattr(profile, f"flops_{part}") or 0 for part in parts)


def parse_bytes(text: str) -> int:
    """Reads an amount of bytes such as `256MiB`.

    Raises:
        ValueError: It is no number with a unit, or zero.
    """
    return _parse(text, BYTES, "256MiB")


def parse_flops(text: str) -> int:
    """Reads an amount of floating-point operations such as `3GFLOP`; a multiply-add is two.

    Raises:
        ValueError: It is no number with a unit, or zero.
    """
    return _parse(text, FLOPS, "3GFLOP")


def _parse(text: str, units: Mapping[str, int], example: str) -> int:
    sizes = {unit.lower(): size for unit, size in units.items()}
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in sizes:
        raise ValueError(f"{text!r} is no amount: expected a number and one of {', '.join(units)}, such as {example}")
    amount = round(float(match[1]) * sizes[match[2].lower()])
    if not amount:
        raise ValueError(f"{text!r} is nothing: expected more, such as {example}, or leave the budget out for no limit")
    return amount


# The name in PEFT's method_comparison, and so in the records.
_ACCURACY = "test accuracy"

Way = tuple[str, str | None, int | None, str | None]
"""What decides on the accuracy: method, target modules, LoRA rank and norm."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one way to train."""

    accuracy: float
    """The mean test accuracy of its runs."""

    runs: int
    """How many there are."""

    advantage: float
    """How much more that is than the mean of all runs on the same task, on average over its tasks: what can be
    compared where ways were tried on different tasks."""


def on_backbone(records: Sequence[Record], backbone: str) -> list[Record]:
    """The records of runs on this network."""
    return [record for record in records if record.run_info.train_config["backbone"]["name"] == backbone]


def evidence(records: Sequence[Record]) -> dict[Way, Evidence]:
    """Returns what the records say of every way that was tried."""
    tasks: dict[str, list[float]] = defaultdict(list)
    ways: dict[Way, list[tuple[str, float]]] = defaultdict(list)
    for record in records:
        config = record.run_info.train_config
        task = json.dumps([config["backbone"], config["data"]], sort_keys=True)
        accuracy = record.train_info.metrics[-1][_ACCURACY]
        tasks[task].append(accuracy)
        ways[_way(config)].append((task, accuracy))
    means = {task: statistics.fmean(accuracies) for task, accuracies in tasks.items()}
    return {
        way: Evidence(
            accuracy=statistics.fmean(accuracy for _, accuracy in runs),
            runs=len(runs),
            advantage=_advantage(runs, means),
        )
        for way, runs in ways.items()
    }


def _advantage(runs: Sequence[tuple[str, float]], means: dict[str, float]) -> float:
    own: dict[str, list[float]] = defaultdict(list)
    for task, accuracy in runs:
        own[task].append(accuracy)
    return statistics.fmean(statistics.fmean(accuracies) - means[task] for task, accuracies in own.items())


def _way(config: dict[str, Any]) -> Way:
    method = config["method"]
    if method in METHODS and METHODS[method].section == "adapter":
        targets = config["adapter"]["target_modules"]
        return method, targets, config["adapter"]["r"], config["norm"]
    return method, None, None, config["norm"]


METHODS_TO_PLAN = ("head", "norm-affine", "lora", "lora-fa", "dora", "galore", "full")
PLACEMENTS = ("all-conv", "dense", "project", "last-stage")
LORA_RANKS = (4, 16)

# Without change to the results first; then with the norms' statistics fixed, which may cost accuracy.
_SETTINGS: tuple[tuple[str, Mapping[str, Any] | None], ...] = (
    ("stats", None),
    ("stats", {"masks": "bit"}),
    ("frozen", {"inplace_norm": True, "masks": "bit"}),
)
# They train the norms, which then cannot be frozen.
_TRAIN_NORMS = ("norm-affine", "galore", "full")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to train, and what a step of it costs."""

    method: str
    """A key of `METHODS`."""

    target_modules: str | None
    """A layer role; None for a method without placement."""

    lora_rank: int | None
    """None for a method without."""

    norm: str
    """What BatchNorm does."""

    lean: Mapping[str, Any] | None
    """Options of `prepare_model_for_lean_training`; None where it is not needed."""

    profile: StepProfile
    """The step."""

    excess: list[str]
    """What of the budget it exceeds; empty if it fits."""

    evidence: Evidence | None = None
    """What the records say of its accuracy; None if nothing."""

    @property
    def name(self) -> str:
        """Method, placement and rank."""
        rank = "" if self.lora_rank is None else f"rank {self.lora_rank}"
        return ", ".join(filter(None, (self.method, self.target_modules, rank)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits a budget, and what does not."""

    fitting: list[Candidate]
    """Each in the mildest setting that fits, the most accurate first, as far as records tell; then those of which they
    do not, from the most trained parameters to the fewest."""

    exceeding: list[Candidate]
    """Each in the most frugal setting; with higher ranks it takes more."""

    records: int
    """How many runs the order is based on."""

    is_same_backbone: bool
    """Whether these were of the same network, or of others."""


def find_plan(
    backbone: nn.Module,
    budget: Budget,
    *,
    methods: Sequence[str] = METHODS_TO_PLAN,
    target_modules: Sequence[str] = PLACEMENTS,
    lora_ranks: Sequence[int] = LORA_RANKS,
    batch_size: int = 16,
    image_size: int = 224,
    optimizer: str = "adamw",
    records: Path | None = None,
) -> Plan:
    """Analyses methods, placements and ranks by shapes alone, each in one setting after the other until it fits.

    The settings are: as it is; lean; lean, with the norms frozen and folded. A rank above one that does not fit is not
    tried.

    Args:
        backbone: A timm model, with the head that is trained; left as it is.
        budget: What a step and the saved update may take.
        methods: Keys of `METHODS`.
        target_modules: Placements of the adapters: layer roles or regular expressions.
        lora_ranks: Ranks of the adapters.
        batch_size: Images in the step.
        image_size: Height and width in pixels.
        optimizer: A key of `OPTIMIZERS`.
        records: A folder with records of runs, to order what fits by their accuracy.

    Raises:
        ValueError: See `analyse`; or the folder holds no records.
    """
    found = [] if records is None else list(read_archive(records).finished.values())
    same = on_backbone(found, getattr(backbone, "name_or_path", ""))
    known = evidence(same or found)
    step = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    fitting, exceeding = [], []
    placements = [(method, place) for method in methods for place in _placements(backbone, method, target_modules)]
    with tqdm(placements, unit="placement", leave=False, disable=None) as bar:
        # With more layers, or a higher rank, a milder setting than before does not fit either.
        needed: list[tuple[str, frozenset[str], int]] = []
        for method, (place, layers) in bar:
            bar.set_description(f"analysing {method}")
            setting = max((last for other, fewer, last in needed if other == method and fewer <= layers), default=0)
            for lora_rank in [None] if place is None else sorted(set(lora_ranks)):
                candidate = _mildest(backbone, budget, method, place, lora_rank, _settings(method)[setting:], step)
                setting = _settings(method).index((candidate.norm, candidate.lean))
                if lora_rank in (None, min(lora_ranks)):
                    needed.append((method, layers, setting))
                if candidate.excess:
                    exceeding.append(candidate)
                    break
                way = (method, place, lora_rank, candidate.norm)
                fitting.append(replace(candidate, evidence=known.get(way)))
    return Plan(
        fitting=sorted(fitting, key=_order),
        exceeding=exceeding,
        records=len(same or found),
        is_same_backbone=bool(same),
    )


def _placements(
    backbone: nn.Module, method: str, target_modules: Sequence[str]
) -> list[tuple[str | None, frozenset[str]]]:
    """The placements that differ on this network, with their layers and the smallest first.

    One without a name for a method that has none.
    """
    if find_method(method).section != "adapter":
        return [(None, frozenset())]
    # An expression is not resolved, and compared with nothing.
    layers = {
        name: frozenset(modules_with_role(backbone, name) if name in ROLES else [name]) for name in target_modules
    }
    distinct = {modules: name for name, modules in reversed(layers.items()) if modules}
    return [(name, modules) for modules, name in sorted(distinct.items(), key=lambda entry: len(entry[0]))]


def _settings(method: str) -> Sequence[tuple[str, Mapping[str, Any] | None]]:
    return [setting for setting in _SETTINGS if method not in _TRAIN_NORMS or setting[0] != "frozen"]


def _mildest(
    backbone: nn.Module,
    budget: Budget,
    method: str,
    place: str | None,
    lora_rank: int | None,
    settings: Sequence[tuple[str, Mapping[str, Any] | None]],
    step: Mapping[str, Any],
) -> Candidate:
    """The first setting that fits, or else the last."""
    for norm, lean in settings:
        adapter = {"norm": norm} if place is None else {"norm": norm, "target_modules": place}
        profile = analyse(backbone, method, lora_rank=lora_rank, adapter=adapter, lean=lean, **step).profile[0]
        excess = budget.excess(profile)
        if not excess:
            break
    return Candidate(
        method=method,
        target_modules=place,
        lora_rank=lora_rank,
        norm=norm,
        lean=lean,
        profile=profile,
        excess=excess,
    )


def _order(candidate: Candidate) -> tuple[bool, float, int]:
    known, trained = candidate.evidence, candidate.profile.num_trainable_params or 0
    return known is None, 0.0 if known is None else -known.advantage, -trained


def plan_table(plan: Plan) -> str:
    """Returns what fits, a line for each, on what its order is based, and why the others do not fit."""
    parts = [_order_of(plan)] if plan.fitting else ["nothing fits"]
    if plan.fitting:
        parts.append(_table(plan))
    if plan.exceeding:
        lines = [
            f"  {candidate.name} ({_setting(candidate)}): {'; '.join(candidate.excess)}" for candidate in plan.exceeding
        ]
        parts.append("\n".join(["these do not fit, nor with a higher rank, in the most frugal setting", *lines]))
    return "\n\n".join(parts)


def _order_of(plan: Plan) -> str:
    what = "these fit, each in the mildest setting that does"
    if any(candidate.evidence is not None for candidate in plan.fitting):
        where = "this backbone" if plan.is_same_backbone else "other backbones"
        return (
            f"{what}; the most accurate first, by {plan.records} runs on {where}, and those without accuracy by the "
            "number of trained parameters"
        )
    return f"{what}; nothing is known of their accuracy, so they are ordered by the number of trained parameters"


def _table(plan: Plan) -> str:
    rows = [["", "", "", "MiB", "GFLOP", "KiB", "k", "test"]]
    rows.append(["", "norm", "lean", "peak", "a step", "saved", "trained", "accuracy"])
    for candidate in plan.fitting:
        profile, known = candidate.profile, candidate.evidence
        rows.append(
            [
                candidate.name,
                candidate.norm,
                _lean(candidate),
                f"{(profile.memory_peak_bytes or 0) / 2**20:,.1f}",
                f"{step_flops(profile) / 1e9:,.2f}",
                f"{(profile.adapter_bytes or 0) / 2**10:,.1f}",
                f"{(profile.num_trainable_params or 0) / 1e3:,.1f}",
                "-" if known is None else f"{known.accuracy:.3f} ({known.runs})",
            ]
        )
    return text_table(rows)


def _setting(candidate: Candidate) -> str:
    return f"norm {candidate.norm}, lean {_lean(candidate)}"


def _lean(candidate: Candidate) -> str:
    if candidate.lean is None:
        return "off"
    return f"{candidate.lean['masks']} masks{', folded norms' if candidate.lean.get('inplace_norm') else ''}"
