"""The model that learns: a copy of the source model, as a method prepares it, with rows for the classes to come."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_edge.backbones import grow_head, set_class_names
from peft_edge.backbones.heads import head_layers
from peft_edge.config import RunConfig
from peft_edge.data import Domain
from peft_edge.lean import prepare_model_for_lean_training
from peft_edge.methods import Method, memory_format
from peft_edge.training.updates import continue_update


def new_learner(config: RunConfig, method: Method, source: nn.Module, target: Domain, previous: Path | None) -> Any:
    """Prepares a model for the training on one target.

    Args:
        config: The run's configuration.
        method: Its method.
        source: The source model; left as it is.
        target: The domain to adapt to. If it has more classes, the head grows, except where nothing trains it.
        previous: The update that adapted the source to the target before this one, which is trained on; None at first.

    Raises:
        ValueError: The method does not fit the model.
    """
    options = config.options(method.section)
    model: Any
    if previous is None:
        model = method.prepare(copy.deepcopy(source), options)
    else:
        model = continue_update(previous, source, method, options)
    model = model.to(memory_format=memory_format(model))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = base.num_classes
    if method.optimizer is not None and target.num_classes > known:
        grow_head(model, target.num_classes)
        set_class_names(base, target.class_names)
        if not config.data.rehearsal_size:
            _freeze_rows(base, known)
    return model


def make_lean(config: RunConfig, model: nn.Module) -> None:
    """Lets the model's frozen layers keep less for the backward pass, if the configuration says so."""
    if config.lean.enabled:
        prepare_model_for_lean_training(model, **config.lean.model_dump(exclude={"enabled"}))


def _freeze_rows(model: nn.Module, count: int) -> None:
    """Keeps the first rows of the head as they are: without images of their classes they would only be unlearned."""

    def without_first_rows(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:count]), gradient[count:]])

    for _, layer in head_layers(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(without_first_rows)
