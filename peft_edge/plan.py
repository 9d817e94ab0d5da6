"""Find the methods, layers and LoRA ranks whose training step fits a budget of memory, FLOPs and adapter size.

Lean options save memory. For each combination of method, layers and rank, the plan uses as few lean options as
possible. Importing this module does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_edge.records import Record, StepProfile, read_archive

if TYPE_CHECKING:
    from torch import nn

METHODS_TO_PLAN = ("head", "bias", "norm-affine", "lora", "lora-fa", "dora", "conv-adapter", "galore", "full")
PLACEMENTS = ("all-conv", "dense", "project", "last-stage")
LORA_RANKS = (4, 16)

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""The number of bytes in each unit."""
FLOPS = {"FLOP": 1, "MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
"""The number of FLOPs in each unit."""


class Setting(NamedTuple):
    """The norm mode and the lean (memory-saving) options of a training step."""

    norm: str
    """The value of the configuration key `norm`, such as `frozen`. It states how BatchNorm layers are treated."""
    lean: Mapping[str, Any]
    """Arguments of `prepare_model_for_lean_training`."""

    def __str__(self) -> str:
        return f"norm {self.norm}, lean {self.lean_text}"

    @property
    def lean_text(self) -> str:
        """A text that lists which of the options `recompute`, `split_blocks` and `checkpoint` are on.

        An example is `recompute=depthwise, checkpoint`. If all three options are off, the text is `default`.
        """
        values = {name: self.lean.get(name, False) for name in ("recompute", "split_blocks", "checkpoint")}
        texts = [name if value is True else f"{name}={value}" for name, value in values.items() if value]
        return ", ".join(texts) or "default"


_LEAN = {"masks": "bit", "inplace_norm": True}
_RECOMPUTE = {**_LEAN, "recompute": True}
# These methods train the weights of the norms. They are always planned with the norm mode "stats".
_NEVER_FROZEN = ("norm-affine", "galore", "full")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits for a training step and for the saved adapter. None means no limit."""

    memory_bytes: int | None = None
    """Peak bytes of all tensors in a step: weights, activations, gradients, optimizer state."""
    flops: int | None = None
    """FLOPs of a step, including the optimizer step. A multiply-add counts as two FLOPs."""
    adapter_bytes: int | None = None
    """Bytes of the saved adapter or, for a method without an adapter, of the trainable parameters."""

    def excess(self, profile: StepProfile) -> list[str]:
        """Return a line of text for each limit that the step exceeds. A field of `profile` that is None counts as 0."""
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
    """Return the FLOPs of forward pass, backward pass (both with elementwise operations) and optimizer step."""
    parts = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")
    return sum(getattr(profile, f"flops_{part}") or 0 for part in parts)


# In measured steps of mobilenetv2_100, the process grew by 1.1 to 2.1 times the peak memory of the tensors, because
# glibc cannot reuse all freed memory immediately. With this factor, the predicted peak memory of the process was within
# 12 % of the measured peak.
_PROCESS_GROWTH = 1.35


def process_memory(profile: StepProfile, library_bytes: int) -> int:
    """Predict the peak memory, in bytes, of a process that trains on the CPU under Linux with glibc.

    The prediction is `library_bytes` plus `_PROCESS_GROWTH` times the peak memory of the tensors. `library_bytes` is
    the result of `library_memory`.
    """
    return library_bytes + round(_PROCESS_GROWTH * (profile.memory_peak_bytes or 0))


_TINY_STEP = """
import torch
from peft_edge import training
from peft_edge.backbones import load_backbone
from peft_edge.profiling.analysis import classification_loss, prepare_step
from peft_edge.profiling.memory import peak_rss_bytes
from peft_edge.profiling.step import take_step

torch.set_num_threads(1)
model, optimizer = prepare_step(load_backbone("mobilenetv3_small_050", 10), "lora", adapter={"norm": "stats"})
take_step(model, torch.randn(2, 3, 32, 32), optimizer, classification_loss)
print(peak_rss_bytes())
"""


@functools.cache
def library_memory() -> int | None:
    """Return the memory, in bytes, of a training process without the tensors of a step. Return None on Windows.

    The function starts a process with the same imports as `train.py`. This process takes a step with tiny tensors, and
    prints its peak memory.
    """
    command = [sys.executable, "-c", _TINY_STEP]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return None if printed == "None" else int(printed)


def parse_bytes(text: str) -> int:
    """Convert a text such as `256MiB` to bytes. The units are the keys of `BYTES`, in upper or lower case.

    Raises:
        ValueError: If the text is not a number with a unit, or if the rounded amount is zero.
    """
    return _parse(text, BYTES, "256MiB")


def parse_flops(text: str) -> int:
    """Convert a text such as `3GFLOP` to FLOPs. The units are the keys of `FLOPS`, in upper or lower case.

    Raises:
        ValueError: If the text is not a number with a unit, or if the rounded amount is zero.
    """
    return _parse(text, FLOPS, "3GFLOP")


def _parse(text: str, units: Mapping[str, int], example: str) -> int:
    """Convert a number with one of `units` to an integer. `example` is a valid text, for the error messages."""
    sizes = {unit.lower(): size for unit, size in units.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in sizes:
        raise ValueError(
            f"{text!r} is not an amount: expected a number and one of {', '.join(units)}, such as {example}"
        )
    amount = round(float(match[1]) * sizes[match[2].lower()])
    if not amount:
        raise ValueError(f"{text!r} is zero: expected more, such as {example}, or omit the budget for no limit")
    return amount


class Variant(NamedTuple):
    """The four options by which `evidence` groups runs. The accuracies of the runs in a group are averaged.

    `target_modules` and `lora_rank` are None if the method does not use the configuration section `adapter`.
    """

    method: str
    target_modules: str | None
    lora_rank: int | None
    norm: str


class Evidence(NamedTuple):
    """The accuracy of one combination of method, target modules, rank and norm, according to records of runs."""

    accuracy: float
    """The mean test accuracy of the runs with this combination."""
    runs: int
    """The number of runs with this combination."""
    advantage: float
    """How much more accurate the runs with this combination are than the average run. For each task (a pair of backbone
    and data), the difference is the mean accuracy of these runs minus the mean accuracy of all runs on the task. The
    value is the mean of these differences over the tasks."""


def evidence(records: Sequence[Record]) -> dict[Variant, Evidence]:
    """Return the accuracy of each combination of method, target modules, rank and norm in `records`.

    All records must be those of successful runs.
    """
    from peft_edge.methods import METHODS

    by_task: dict[str, list[float]] = defaultdict(list)
    by_variant: dict[Variant, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = record.run_info.train_config
        task = json.dumps([config["backbone"], config["data"]], sort_keys=True)
        accuracy = record.train_info.metrics[-1]["test accuracy"]
        by_task[task].append(accuracy)
        method, adapter = config["method"], config["adapter"]
        has_adapter = method in METHODS and METHODS[method].section == "adapter"
        target_modules, lora_rank = (adapter["target_modules"], adapter["r"]) if has_adapter else (None, None)
        by_variant[Variant(method, target_modules, lora_rank, config["norm"])][task].append(accuracy)
    means = {task: statistics.fmean(accuracies) for task, accuracies in by_task.items()}
    known = {}
    for variant, tasks in by_variant.items():
        accuracies = [accuracy for of_task in tasks.values() for accuracy in of_task]
        advantage = statistics.fmean(statistics.fmean(of_task) - means[task] for task, of_task in tasks.items())
        known[variant] = Evidence(statistics.fmean(accuracies), len(accuracies), advantage)
    return known


@dataclass(frozen=True, kw_only=True)
class PlanOption:
    """A combination of method, adapted layers, rank and setting, and the cost of a training step with these values."""

    method: str
    """A key of `METHODS`."""
    target_modules: str | None
    """A role name such as `all-conv`, or a regular expression. None if the method has no section `adapter`."""
    lora_rank: int | None
    """The rank of the adapters. None if the method has no section `adapter`."""
    setting: Setting
    """The first of the settings in `find_plan` with which the step fits the budget.

    If the step fits with none of these settings, this is the last analysed setting.
    """
    profile: StepProfile
    """The cost of the step with `setting`."""
    excess: list[str]
    """One line for each limit of the budget that the step exceeds; empty if the step fits."""
    evidence: Evidence | None = None
    """The accuracy of this option in the records; None if no record has this option, or if the step does not fit."""

    @property
    def name(self) -> str:
        """`method`, `target_modules` and `lora_rank` as text. Values that are None are left out."""
        rank = "" if self.lora_rank is None else f"rank {self.lora_rank}"
        return ", ".join(filter(None, (self.method, self.target_modules, rank)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options that fit a budget, and the options that exceed the budget."""

    fitting: list[PlanOption]
    """The options that fit. Options whose accuracy is known from runs come first, in order of decreasing
    `Evidence.advantage`. All other options follow, in order of decreasing number of trainable parameters."""
    exceeding: list[PlanOption]
    """The options that exceed the budget, whatever lean options are used. If several ranks of a method with the same
    target modules exceed the budget, only the lowest of these ranks is listed."""
    records: int
    """The number of successful runs whose accuracies determine the order of `fitting`."""
    is_same_backbone: bool
    """Whether the runs that determine the order used the planned backbone. False if there are no such runs."""
    library_bytes: int | None = None
    """The result of `library_memory`: the memory of a training process without a step's tensors. None if unknown."""


def find_plan(
    backbone: nn.Module,
    budget: Budget,
    *,
    methods: Sequence[str] = METHODS_TO_PLAN,
    target_modules: Sequence[str] = PLACEMENTS,
    lora_ranks: Sequence[int] = LORA_RANKS,
    norm: str = "frozen",
    batch_size: int = 16,
    image_size: int = 224,
    optimizer: str = "adamw",
    records: Path | None = None,
    library_bytes: int | None = None,
) -> Plan:
    """Find methods, target modules and ranks whose training step fits a budget.

    Costs are computed from tensor shapes, without running the step.

    Each combination is analysed with up to five settings of the memory-saving options, until the step fits. The first
    setting is the lean training of `train.py`. The second setting also recomputes the outputs of depthwise convolutions
    in the backward pass. The third setting recomputes the outputs of all cheap convolutions. If the norm mode is
    "frozen" or "recalibrate", the fourth setting adds `split_blocks`. The last setting adds timm's gradient
    checkpointing, if the network supports it. If the step does not fit with a rank, higher ranks are skipped.

    `backbone` is a timm model with the head to be trained. This model is not changed. `methods` are keys of `METHODS`,
    and `optimizer` is a key of `OPTIMIZERS`. `target_modules` are role names such as `all-conv`, or regular
    expressions. `norm` is a value of the key `norm` of `train.py`. Methods that train weights of norms always use
    "stats". `records` is a folder with records of runs. The accuracies in these records determine the order of the
    fitting options. Runs with other backbones are used only if there are no runs with this backbone. `library_bytes` is
    stored in the result.

    Raises:
        ValueError: If `analyse` rejects a combination, or if the folder `records` contains no records.
    """
    from tqdm.auto import tqdm

    found = [] if records is None else list(read_archive(records).finished.values())
    name = getattr(backbone, "name_or_path", "")
    same = [record for record in found if record.run_info.train_config["backbone"]["name"] == name]
    known = evidence(same or found)
    step = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    fitting, exceeding = [], []
    can_checkpoint = _can_checkpoint(backbone)
    placements = [(method, place) for method in methods for place in _placements(backbone, method, target_modules)]
    # Show the bar even if stderr is a file or a pipe, because the analysis takes minutes. Each update of the bar is a
    # new line there, so update less often.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(placements, unit="placement", leave=False, mininterval=interval) as bar:
        # Each entry has a method, its adapted layers, and the index of the setting that was found for them. If a later
        # step of the same method adapts all of these layers, it needs at least as much memory. The search for that step
        # therefore starts at this setting.
        needed: list[tuple[str, frozenset[str], int]] = []
        for method, (place, layers) in bar:
            bar.set_description(f"analysing {method}")
            settings = _settings("stats" if method in _NEVER_FROZEN else norm, can_checkpoint=can_checkpoint)
            first = max((last for other, fewer, last in needed if other == method and fewer <= layers), default=0)
            for lora_rank in [None] if place is None else sorted(set(lora_ranks)):
                option = _first_fitting(backbone, budget, method, place, lora_rank, settings[first:], step)
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
        library_bytes=library_bytes,
    )


def _settings(norm: str, *, can_checkpoint: bool) -> list[Setting]:
    """Return the settings that `find_plan` tries with a norm mode. Later ones save more memory and take more time."""
    splits = {"split_blocks": True} if norm in ("frozen", "recalibrate") else {}
    options = [_LEAN, {**_LEAN, "recompute": "depthwise"}, _RECOMPUTE]
    if splits:
        options.append({**_RECOMPUTE, **splits})
    if can_checkpoint:
        options.append({**_RECOMPUTE, **splits, "checkpoint": True})
    return [Setting(norm, lean) for lean in options]


def _can_checkpoint(backbone: nn.Module) -> bool:
    """Return whether the network has timm's gradient checkpointing."""
    from peft_edge.roles import meta_copy

    try:
        meta_copy(backbone).set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # what timm raises for networks without this feature
        return False
    return True


def _placements(
    backbone: nn.Module, method: str, target_modules: Sequence[str]
) -> list[tuple[str | None, frozenset[str]]]:
    """Return a pair for each entry of `target_modules`: the entry, and the names of the layers that it selects.

    The pair with the fewest layers comes first. Entries that select no layer are left out. If several entries select
    the same layers, only the first of them is returned. If the method does not use the configuration section `adapter`,
    the result has a single pair: None, and an empty set.
    """
    from peft_edge.methods import find_method
    from peft_edge.roles import ROLES, modules_with_role

    if find_method(method).section != "adapter":
        return [(None, frozenset())]
    # Regular expressions are not resolved to layers, so each expression counts as a distinct placement.
    layers = {
        name: frozenset(modules_with_role(backbone, name) if name in ROLES else [name]) for name in target_modules
    }
    distinct = {modules: name for name, modules in reversed(layers.items()) if modules}
    return [(name, modules) for modules, name in sorted(distinct.items(), key=lambda entry: len(entry[0]))]


def _first_fitting(
    backbone: nn.Module,
    budget: Budget,
    method: str,
    place: str | None,
    lora_rank: int | None,
    settings: Sequence[Setting],
    step: Mapping[str, Any],
) -> PlanOption:
    """Analyse the step with each of `settings` until the step fits. Return the option with the last analysed setting.

    The search also ends if the step exceeds the limit `flops` or `adapter_bytes` of the budget, because the settings
    differ in their lean options, which save only memory.
    """
    from peft_edge.profiling import analysis

    for setting in settings:
        adapter = {"norm": setting.norm} if place is None else {"norm": setting.norm, "target_modules": place}
        cost = analysis.analyse(backbone, method, lora_rank=lora_rank, adapter=adapter, lean=setting.lean, **step)
        profile = cost.profile[0]
        excess = budget.excess(profile)
        if not excess or replace(budget, memory_bytes=None).excess(profile):
            break
    return PlanOption(
        method=method, target_modules=place, lora_rank=lora_rank, setting=setting, profile=profile, excess=excess
    )


def _order(option: PlanOption) -> tuple[bool, float, int]:
    """Return the sort key of an option. `Plan.fitting` describes the order."""
    known, trained = option.evidence, option.profile.num_trainable_params or 0
    return known is None, 0.0 if known is None else -known.advantage, -trained


def plan_table(plan: Plan) -> str:
    """Return a text: a table of the options that fit, and then a line for each option that exceeds a limit."""
    from peft_edge.profiling.tables import text_table

    where = "this backbone" if plan.is_same_backbone else "other backbones"
    order = "nothing is known of their accuracy, so most trained parameters come first"
    if any(option.evidence is not None for option in plan.fitting):
        order = (
            f"the most accurate first, by {plan.records} runs on {where}, then those without runs, most trained "
            "parameters first"
        )
    rows = [
        ["", "", "", "MiB", "MiB", "GFLOP", "KiB", "k", "test"],
        ["", "norm", "lean", "tensors", "process", "a step", "saved", "trained", "accuracy"],
    ]
    libraries = plan.library_bytes
    for option in plan.fitting:
        profile, known = option.profile, option.evidence
        rows.append(
            [
                option.name,
                option.setting.norm,
                option.setting.lean_text,
                f"{(profile.memory_peak_bytes or 0) / 2**20:,.1f}",
                "-" if libraries is None else f"{process_memory(profile, libraries) / 2**20:,.0f}",
                f"{step_flops(profile) / 1e9:,.2f}",
                f"{(profile.adapter_bytes or 0) / 2**10:,.1f}",
                f"{(profile.num_trainable_params or 0) / 1e3:,.1f}",
                "-" if known is None else f"{known.accuracy:.3f} ({known.runs})",
            ]
        )
    parts = ["nothing fits"]
    if plan.fitting:
        parts = [f"these fit, each with as few lean options as possible; {order}", text_table(rows)]
    if plan.exceeding:
        lines = [f"  {option.name} ({option.setting}): {'; '.join(option.excess)}" for option in plan.exceeding]
        parts.append("\n".join(["these do not fit, nor with a higher rank or other lean options", *lines]))
    return "\n\n".join(parts)
