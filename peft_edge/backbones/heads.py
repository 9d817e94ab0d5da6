"""The classifier of a timm model: where it is, how to replace and grow it, and what its classes are called."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

INIT_STD = 0.01


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
    """Gives the model a new classifier, its weights drawn from N(0, 0.01) and its bias 0; its classes have no names.

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
    set_class_names(model, None)
    for _, layer in head_layers(model):
        nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def grow_head(model: nn.Module, num_classes: int, *, generator: torch.Generator | None = None) -> None:
    """Adds rows for new classes to the classifier, drawn as by :func:`replace_head`; the old rows keep every bit.

    The names of the classes are dropped, since they are no longer all of them; :func:`set_class_names` gives the new
    ones. The parameters are new objects: make the optimizer afterwards.

    Args:
        model: A timm model, or a PEFT model of one, changed in place. Where its head is one of PEFT's
            `modules_to_save`, the original and the copy of every adapter grow.
        num_classes: Outputs of the grown classifier.
        generator: Source of the random numbers; torch's global one by default. On the model's device.

    Raises:
        TypeError: The model was not made by timm.
        ValueError: The model has more classes already, or no head, or an adapter sits inside its head.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else as_timm_model(model)
    layers = head_layers(base)
    if not layers:
        raise ValueError(f"{type(base).__name__} has no head to grow: give it one with replace_head.")
    if num_classes < base.num_classes:
        raise ValueError(
            f"num_classes: expected at least {base.num_classes}, the classes that the model has, found {num_classes}: "
            "a head only grows. replace_head makes a smaller one."
        )
    if num_classes == base.num_classes:
        return
    for name in head_names(base):
        if any(isinstance(module, BaseTunerLayer) for module in base.get_submodule(name).modules()):
            raise ValueError(
                f"{name} holds an adapter, whose rows would have to grow too: merge it first, or train the head whole, "
                f"with modules_to_save=[{name!r}]."
            )
    for _, layer in layers:
        _grow(layer, num_classes, generator)
    base.num_classes = num_classes
    set_class_names(base, None)


def _grow(layer: nn.Linear | nn.Conv2d, num_classes: int, generator: torch.Generator | None) -> None:
    weight, bias = layer.weight, layer.bias
    rows = weight.new_empty(num_classes - len(weight), *weight.shape[1:]).normal_(std=INIT_STD, generator=generator)
    layer.weight = _appended(weight, rows)
    if bias is not None:
        layer.bias = _appended(bias, bias.new_zeros(len(rows)))
    # What the layer says of itself: a linear layer has features, a convolution channels.
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", num_classes)


def _appended(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.detach(), rows]), requires_grad=parameter.requires_grad)


def set_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Names the outputs of the classifier, in their order; `save_backbone` and `save_adapter` keep the names.

    Args:
        model: A timm model, or a PEFT model of one.
        names: A name for each class; None for no names.

    Raises:
        TypeError: The model was not made by timm.
        ValueError: There are not as many names as classes.
    """
    timm_model = as_timm_model(model)
    if names is not None:
        _check_number(names, timm_model.num_classes)
    # timm's own place for them.
    timm_model.pretrained_cfg["label_names"] = None if names is None else list(names)


def class_names(model: nn.Module) -> list[str] | None:
    """Returns the names of the classifier's outputs, in their order; None if they have none.

    Raises:
        ValueError: The classifier has been exchanged since, so there are not as many names as classes.
    """
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if names is None:
        return None
    _check_number(names, cast(Any, model).num_classes)
    # timm also takes names by index.
    return list(names.values()) if isinstance(names, dict) else list(names)


def _check_number(names: Collection[str], num_classes: int) -> None:
    if len(names) != num_classes:
        raise ValueError(
            f"class names: expected one for each of the {num_classes} classes of the head, found {len(names)}: "
            "set_class_names takes the names of all, in the order of the head's rows."
        )


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
