"""Find the methods, layers and ranks that fit a budget, each in the mildest lean setting that it needs.

torch is imported by `find_plan` only, so that the command line reads the amounts and defaults below at once.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_edge.records import Record, StepProfile, read_archive

if TYPE_CHECKING:
    from torch import nn

METHODS_TO_PLAN = ("head", "norm-affine", "lora", "lora-fa", "dora", "galore", "full")
PLACEMENTS = ("all-conv", "dense", "project", "last-stage")
LORA_RANKS = (4, 16)

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FLOPS = {"FLOP": 1, "MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
"""The units of amounts."""


class Setting(NamedTuple):
    """How a step trains the norms, and its lean form."""

    norm: str
    """What the method changes in BatchNorm layers."""
    lean: Mapping[str, Any] | None
    """Arguments of `prepare_model_for_lean_training`; None for a step that is not lean."""

    def __str__(self) -> str:
        return f"norm {self.norm}, lean {self.lean_text}"

    @property
    def lean_text(self) -> str:
        """`off`, or the masks and what the norms do."""
        if self.lean is None:
            return "off"
        return f"{self.lean['masks']} masks{', in-place norms' if self.lean.get('inplace_norm') else ''}"


# The first two give the same results. The third fixes the statistics of the norms, which may cost accuracy.
_SETTINGS = (
    Setting("stats", None),
    Setting("stats", {"masks": "bit"}),
    Setting("frozen", {"inplace_norm": True, "masks": "bit"}),
)
# Methods that train the norms, which then cannot be frozen.
_TRAIN_NORMS = ("norm-affine", "galore", "full")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a training step and the saved update may take; None for no limit."""

    memory_bytes: int | None = None
    """Bytes of tensors at the peak of a step: weights, activations, gradients, optimizer state."""
    flops: int | None = None
    """All operations of a step."""
    adapter_bytes: int | None = None
    """Bytes of the saved update."""

    def excess(self, profile: StepProfile) -> list[str]:
        """Return a line for each limit that a step exceeds; an empty list if it fits."""
        found = (profile.memory_peak_bytes or 0, step_flops(profile), profile.adapter_bytes or 0)
        return [
            f"{name} {amount / size:,.1f} {unit}, {(amount - most) / size:,.1f} over"
            for (name, most, unit, size), amount in zip(self._limits(), found, strict=True)
            if most is not None and amount > most
        ]

    def __str__(self) -> str:
        limits = [f"{name} {most / size:,g} {unit}" for name, most, unit, size in self._limits() if most is not None]
        return f"at most {', '.join(limits)}" if limits else "no limit"

    def _limits(self) -> list[tuple[str, int | None, str, int]]:
        return [
            ("memory", self.memory_bytes, "MiB", 2**20),
            ("arithmetic", self.flops, "GFLOP", 10**9),
            ("saved update", self.adapter_bytes, "KiB", 2**10),
        ]


def step_flops(profile: StepProfile) -> int:
    """Return the number of operations of a step: forward, backward, elementwise and the optimizer's."""
    parts = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")
    return sum(getattr(profile, f"flops_{part}") or 0 for part in parts)


def parse_bytes(text: str) -> int:
    """Return the number of bytes of a text such as `256MiB`.

    Raises:
        ValueError: If the text is not a number with a unit, or the amount is zero.
    """
    return _parse(text, BYTES, "256MiB")


def parse_flops(text: str) -> int:
    """Return the number of operations of a text such as `3GFLOP`; a multiply-add is two.

    Raises:
        ValueError: If the text is not a number with a unit, or the amount is zero.
    """
    return _parse(text, FLOPS, "3GFLOP")


def _parse(text: str, units: Mapping[str, int], example: str) -> int:
    sizes = {unit.lower(): size for unit, size in units.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in sizes:
        raise ValueError(f"{text!r} is no amount: expected a number and one of {', '.join(units)}, such as {example}")
    amount = round(float(match[1]) * sizes[match[2].lower()])
    if not amount:
        raise ValueError(f"{text!r} is nothing: expected more, such as {example}, or leave the budget out for no limit")
    return amount


class Variant(NamedTuple):
    """The part of a run's configuration that decides its accuracy; the placement and rank are those of an adapter."""

    method: str
    target_modules: str | None
    lora_rank: int | None
    norm: str


class Evidence(NamedTuple):
    """The accuracy of one variant in the records."""

    accuracy: float
    """The mean test accuracy of its runs."""
    runs: int
    """The number of its runs."""
    advantage: float
    """Its accuracy minus the mean of all runs on the same task, averaged over tasks: comparable across tasks."""


def evidence(records: Sequence[Record]) -> dict[Variant, Evidence]:
    """Return the accuracy of each variant in the records."""
    by_task: dict[str, list[float]] = defaultdict(list)
    by_variant: dict[Variant, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = record.run_info.train_config
        task = json.dumps([config["backbone"], config["data"]], sort_keys=True)
        accuracy = record.train_info.metrics[-1]["test accuracy"]
        by_task[task].append(accuracy)
        by_variant[_variant(config)][task].append(accuracy)
    means = {task: statistics.fmean(accuracies) for task, accuracies in by_task.items()}
    known = {}
    for variant, tasks in by_variant.items():
        accuracies = [accuracy for of_task in tasks.values() for accuracy in of_task]
        advantage = statistics.fmean(statistics.fmean(of_task) - means[task] for task, of_task in tasks.items())
        known[variant] = Evidence(statistics.fmean(accuracies), len(accuracies), advantage)
    return known


def _variant(config: dict[str, Any]) -> Variant:
    from peft_edge.methods import METHODS

    method, adapter = config["method"], config["adapter"]
    if method in METHODS and METHODS[method].section == "adapter":
        return Variant(method, adapter["target_modules"], adapter["r"], config["norm"])
    return Variant(method, None, None, config["norm"])


@dataclass(frozen=True, kw_only=True)
class PlanOption:
    """A variant in the setting that it needs, and the cost of a step."""

    method: str
    """A key of `METHODS`."""
    target_modules: str | None
    """A layer role or a regular expression; None for a method without adapters."""
    lora_rank: int | None
    """The rank of the adapters; None for a method without adapters."""
    setting: Setting
    """The mildest setting that fits, or the most frugal one."""
    profile: StepProfile
    """The step."""
    excess: list[str]
    """The limits of the budget that it exceeds; none if it fits."""
    evidence: Evidence | None = None
    """Its accuracy in the records; None if there are no runs of it."""

    @property
    def name(self) -> str:
        """Method, placement and rank."""
        rank = "" if self.lora_rank is None else f"rank {self.lora_rank}"
        return ", ".join(filter(None, (self.method, self.target_modules, rank)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options that fit a budget, and those that do not."""

    fitting: list[PlanOption]
    """Most accurate first, according to the records; then those without records, most trained parameters first."""
    exceeding: list[PlanOption]
    """Options that exceed the budget also in their most frugal setting; higher ranks exceed it by more."""
    records: int
    """The number of runs that the order is based on."""
    is_same_backbone: bool
    """Whether they were runs of this backbone; otherwise of others."""


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
    """Analyse methods, placements and ranks from shapes alone, each in one setting after the other until it fits.

    The settings are: not lean; lean; lean with frozen norms that work in place. Ranks above one that does not fit are
    skipped. `backbone` is a timm model with the head that is trained, and is not changed. `methods` and `optimizer` are
    keys of `METHODS` and `OPTIMIZERS`, and `target_modules` are layer roles or regular expressions. `records` is the
    folder of records that order the options by accuracy.

    Raises:
        ValueError: If `analyse` raises it, or the folder has no records.
    """
    from tqdm.auto import tqdm

    found = [] if records is None else list(read_archive(records).finished.values())
    name = getattr(backbone, "name_or_path", "")
    same = [record for record in found if record.run_info.train_config["backbone"]["name"] == name]
    known = evidence(same or found)
    step = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    fitting, exceeding = [], []
    placements = [(method, place) for method in methods for place in _placements(backbone, method, target_modules)]
    with tqdm(placements, unit="placement", leave=False, disable=None) as bar:
        # The setting that a placement needs. With more layers or a higher rank, a milder one does not fit either.
        needed: list[tuple[str, frozenset[str], int]] = []
        for method, (place, layers) in bar:
            bar.set_description(f"analysing {method}")
            settings = [setting for setting in _SETTINGS if setting.norm != "frozen" or method not in _TRAIN_NORMS]
            first = max((last for other, fewer, last in needed if other == method and fewer <= layers), default=0)
            for lora_rank in [None] if place is None else sorted(set(lora_ranks)):
                option = _mildest(backbone, budget, method, place, lora_rank, settings[first:], step)
                first = settings.index(option.setting)
                if lora_rank in (None, min(lora_ranks)):
                    needed.append((method, layers, first))
                if option.excess:
                    exceeding.append(option)
                    break
                variant = Variant(method, place, lora_rank, option.setting.norm)
                fitting.append(replace(option, evidence=known.get(variant)))
    return Plan(
        fitting=sorted(fitting, key=_order),
        exceeding=exceeding,
        records=len(same or found),
        is_same_backbone=bool(same),
    )


def _placements(
    backbone: nn.Module, method: str, target_modules: Sequence[str]
) -> list[tuple[str | None, frozenset[str]]]:
    """The placements that differ on this backbone and their layers, smallest first; one None if not an adapter."""
    from peft_edge.methods import find_method
    from peft_edge.roles import ROLES, modules_with_role

    if find_method(method).section != "adapter":
        return [(None, frozenset())]
    # A regular expression is not resolved, so it is compared with no other placement.
    layers = {
        name: frozenset(modules_with_role(backbone, name) if name in ROLES else [name]) for name in target_modules
    }
    distinct = {modules: name for name, modules in reversed(layers.items()) if modules}
    return [(name, modules) for modules, name in sorted(distinct.items(), key=lambda entry: len(entry[0]))]


def _mildest(
    backbone: nn.Module,
    budget: Budget,
    method: str,
    place: str | None,
    lora_rank: int | None,
    settings: Sequence[Setting],
    step: Mapping[str, Any],
) -> PlanOption:
    """The first setting that fits, or else the last."""
    from peft_edge.profiling import analysis

    for setting in settings:
        adapter = {"norm": setting.norm} if place is None else {"norm": setting.norm, "target_modules": place}
        cost = analysis.analyse(backbone, method, lora_rank=lora_rank, adapter=adapter, lean=setting.lean, **step)
        profile = cost.profile[0]
        excess = budget.excess(profile)
        if not excess:
            break
    return PlanOption(
        method=method, target_modules=place, lora_rank=lora_rank, setting=setting, profile=profile, excess=excess
    )


def _order(option: PlanOption) -> tuple[bool, float, int]:
    known, trained = option.evidence, option.profile.num_trainable_params or 0
    return known is None, 0.0 if known is None else -known.advantage, -trained


def plan_table(plan: Plan) -> str:
    """Return the options that fit as a table, the reason for its order, and why the others do not fit."""
    parts = [_reason_for_order(plan), _fitting_table(plan)] if plan.fitting else ["nothing fits"]
    if plan.exceeding:
        lines = [f"  {option.name} ({option.setting}): {'; '.join(option.excess)}" for option in plan.exceeding]
        parts.append("\n".join(["these do not fit, nor with a higher rank, in the most frugal setting", *lines]))
    return "\n\n".join(parts)


def _reason_for_order(plan: Plan) -> str:
    text = "these fit, each in the mildest setting that does"
    if all(option.evidence is None for option in plan.fitting):
        return f"{text}; nothing is known of their accuracy, so most trained parameters come first"
    where = "this backbone" if plan.is_same_backbone else "other backbones"
    return (
        f"{text}; the most accurate first, by {plan.records} runs on {where}, then those without runs, most trained "
        "parameters first"
    )


def _fitting_table(plan: Plan) -> str:
    from peft_edge.profiling.tables import text_table

    rows = [["", "", "", "MiB", "GFLOP", "KiB", "k", "test"]]
    rows.append(["", "norm", "lean", "peak", "a step", "saved", "trained", "accuracy"])
    for option in plan.fitting:
        profile, known = option.profile, option.evidence
        rows.append(
            [
                option.name,
                option.setting.norm,
                option.setting.lean_text,
                f"{(profile.memory_peak_bytes or 0) / 2**20:,.1f}",
                f"{step_flops(profile) / 1e9:,.2f}",
                f"{(profile.adapter_bytes or 0) / 2**10:,.1f}",
                f"{(profile.num_trainable_params or 0) / 1e3:,.1f}",
                "-" if known is None else f"{known.accuracy:.3f} ({known.runs})",
            ]
        )
    return text_table(rows)
