"""Values that are valid each for itself and cannot work, as far as that shows without data and network."""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from peft_edge.config.sections import RunConfig
from peft_edge.roles import ROLES

Problem = tuple[str, str]
"""A key, and what is wrong with it."""


def conflicts(config: RunConfig) -> Iterator[Problem]:
    """Yields what cannot work in `config`."""
    yield from _source(config)
    yield from _task(config)
    yield from _training(config)
    yield from _lean(config)
    yield from _hub(config)
    for section in ("adapter", "conv_adapter"):
        yield from _targets(f"{section}.target_modules", getattr(config, section).target_modules)


def _source(config: RunConfig) -> Iterator[Problem]:
    backbone = config.backbone
    if backbone.pretrained and backbone.checkpoint is not None:
        yield "backbone.checkpoint", "cannot be given together with backbone.pretrained: choose one"
    if config.source.epochs == 0 and not (backbone.pretrained or backbone.checkpoint is not None):
        yield (
            "source.epochs",
            "is 0 and the weights are random: set backbone.pretrained or backbone.checkpoint, or train the source",
        )


def _task(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if (data.shift is None) == (not data.new_classes):
        found = "neither" if data.shift is None else "both"
        yield "data.shift", f"expected a shift or data.new_classes, found {found}: give one of them"
    if data.new_classes and not data.rehearsal_size and config.training.weight_decay:
        yield (
            "training.weight_decay",
            "would shrink the old classes' rows of the head, which are frozen where data.rehearsal_size is 0: set it "
            "to 0, or rehearse",
        )


def _training(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.batch_size % training.gradient_accumulation_steps:
        yield (
            "training.batch_size",
            f"({training.batch_size}) cannot be divided into training.gradient_accumulation_steps "
            f"({training.gradient_accumulation_steps}) equal parts",
        )
    if training.mixed_precision == "fp16" and config.cpu:
        yield "training.mixed_precision", "fp16 needs a GPU: use bf16, or leave cpu out"
    if config.method == "galore" and config.galore.layerwise:
        whole = {
            "training.max_grad_norm": training.max_grad_norm is not None,
            "training.gradient_accumulation_steps": training.gradient_accumulation_steps > 1,
            "training.mixed_precision": training.mixed_precision == "fp16",
        }
        for key, needs_all_gradients in whole.items():
            if needs_all_gradients:
                yield key, "needs all gradients at once, of which galore.layerwise keeps one: leave one of them out"


def _lean(config: RunConfig) -> Iterator[Problem]:
    if config.lean.enabled and config.lean.fold_norm and config.norm in ("stats", "affine"):
        yield "lean.fold_norm", f"folds frozen BatchNorm, and norm is {config.norm}: set norm to frozen or restat"


def _hub(config: RunConfig) -> Iterator[Problem]:
    if config.hub.repo_id is None:
        return
    if config.method == "none":
        yield "hub.repo_id", "is given and the method none makes nothing to push: leave one of them out"
    if "/" not in config.hub.repo_id:
        yield "hub.repo_id", f"expected owner/name, found {config.hub.repo_id!r}"
    try:
        validate_repo_id(config.hub.repo_id)
    except HFValidationError as error:
        yield "hub.repo_id", str(error)


def _targets(key: str, target: str | list[str]) -> Iterator[Problem]:
    if not isinstance(target, str):
        return
    if re.fullmatch("[a-z]+(-[a-z]+)+", target) and target not in ROLES:
        yield key, f"{target!r} is no role; the roles are {', '.join(ROLES)}"
    try:
        re.compile(target)
    except re.error as error:
        yield key, f"{target!r} is no regular expression: {error}"
