"""The classifier of a timm model: where it is, and how to put a new one in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def head_names(model: nn.Module) -> list[str]:
    """Returns the names of the classifier modules, e.g. ``["classifier"]``; several for distilled models.

    Empty for a model built without a classifier (``num_classes=0``).

    Raises:
        TypeError: The model was not made by timm.
    """
    classifiers = as_timm_model(model).get_classifier()
    heads = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Identity) and any(module is head for head in heads)
    ]


def replace_head(model: nn.Module, num_classes: int, *, generator: torch.Generator | None = None) -> None:
    """Gives the model a new classifier, its weights drawn from N(0, 0.01) and its bias 0.

    timm draws the heads of its mobile networks so wide that ten classes start with a cross-entropy of 6 to 8; from
    here they start at the uniform log(num_classes).

    Args:
        model: A timm model; changed in place.
        num_classes: Outputs of the new classifier.
        generator: Source of the random numbers; torch's global one by default. On the model's device.

    Raises:
        TypeError: The model was not made by timm.
        ValueError: `num_classes` is less than 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}.")
    as_timm_model(model).reset_classifier(num_classes)
    for _, layer in head_layers(model):
        nn.init.normal_(layer.weight, std=0.01, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def head_layers(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers with one output a class; a head may hold more than them (a norm, dropout)."""
    return [
        (name, module)
        for head in head_names(model)
        for name, module in model.get_submodule(head).named_modules(prefix=head)
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def as_timm_model(model: nn.Module) -> Any:
    """Returns the model, untyped: timm has no base class that would declare what its models share."""
    if not hasattr(model, "get_classifier") or not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"Expected a model made by timm, found {type(model).__name__}. Build it with load_backbone.")
    return model
