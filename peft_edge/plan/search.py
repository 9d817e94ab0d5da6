"""The search: for every method, placement and rank, the mildest setting that fits a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from peft_edge.archive import read_archive
from peft_edge.methods import find_method
from peft_edge.plan.budget import Budget
from peft_edge.plan.evidence import Evidence, evidence, on_backbone
from peft_edge.profiling.analysis import analyse
from peft_edge.records import StepProfile
from peft_edge.roles import ROLES, modules_with_role

METHODS_TO_PLAN = ("head", "norm-affine", "lora", "lora-fa", "dora", "galore", "full")
PLACEMENTS = ("all-conv", "dense", "project", "last-stage")
LORA_RANKS = (4, 16)

# Without change to the results first; then with the norms' statistics fixed, which may cost accuracy.
_SETTINGS: tuple[tuple[str, Mapping[str, Any] | None], ...] = (
    ("stats", None),
    ("stats", {"masks": "bit"}),
    ("frozen", {"fold_norm": True, "masks": "bit"}),
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
