"""Find, replace and grow the classifier (head) of a timm model, and name its classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class TimmModel(nn.Module):
    """Attributes of timm models, for type checkers. Only `load_backbone` sets `name_or_path` and `small_images`."""

    num_classes: int
    pretrained_cfg: dict[str, Any]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    reset_classifier: Callable[[int], None]
    forward_features: Callable[[torch.Tensor], torch.Tensor]
    forward_head: Callable[..., torch.Tensor]
    name_or_path: str
    small_images: bool


def as_timm_model(model: nn.Module) -> TimmModel:
    """Return `model` itself, typed as a timm model. Raise a `TypeError` if timm did not build the model."""
    if not hasattr(model, "get_classifier") or not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"Expected a model made by timm, found {type(model).__name__}. Build it with load_backbone.")
    return cast(TimmModel, model)


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the classifier modules of a timm model. Return an empty list if it has no classifier.

    Raises:
        TypeError: If the model was not built by timm.

    Example:
        >>> from timm import create_model
        >>> head_names(create_model("mobilenetv2_035")), head_names(create_model("levit_128s"))
        (['classifier'], ['head', 'head_dist'])
    """
    classifiers = as_timm_model(model).get_classifier()
    heads = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    return [name for name, module in model.named_modules() if module in heads and not isinstance(module, nn.Identity)]


def head_layers(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Return a pair (name, layer) for each linear or convolutional layer in the classifier of a timm model."""
    return [
        (name, module)
        for head in head_names(model)
        for name, module in model.get_submodule(head).named_modules(prefix=head)
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def replace_head(model: nn.Module, num_classes: int, *, generator: torch.Generator | None = None) -> None:
    """Replace the classifier of a timm model in place. The new weights follow N(0, 0.01²), and the biases are zero.

    With these small weights, the cross-entropy at the start of training is near log(num_classes), the loss of a uniform
    prediction. With timm's initialisation of mobile networks, the cross-entropy would be 6 to 8 for ten classes. The
    class names of the model are removed. `generator` must be on the device of the model.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If `num_classes` is less than 1.

    Example:
        >>> from timm import create_model
        >>> model = create_model("mobilenetv2_035")
        >>> replace_head(model, 3)
        >>> model.classifier
        Linear(in_features=1280, out_features=3, bias=True)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}.")
    as_timm_model(model).reset_classifier(num_classes)
    set_class_names(model, None)
    for _, layer in head_layers(model):
        nn.init.normal_(layer.weight, std=0.01, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def grow_head(model: nn.Module, num_classes: int, *, generator: torch.Generator | None = None) -> None:
    """Add rows for new classes to the classifier (head) of a timm model in place, until it has `num_classes` rows.

    A row is the part of the head's weight and bias that belongs to one class. The new rows are initialised as in
    :func:`replace_head`. The old rows are unchanged. The class names are removed, so call :func:`set_class_names`
    afterwards. The parameters of the head are new objects, so create the optimizer after this call. If the model
    already has `num_classes` classes, nothing changes, and the class names are kept. `model` may also be a PEFT model.
    If the head of a PEFT model is one of the `modules_to_save`, the original head and its copy in each adapter grow.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If the model has more than `num_classes` classes, has no head, or has an adapter inside its head.

    Example:
        >>> from timm import create_model
        >>> model = create_model("mobilenetv2_035", num_classes=2)
        >>> grow_head(model, 5)
        >>> model.num_classes, model.classifier.weight.shape
        (5, torch.Size([5, 1280]))
    """
    base = as_timm_model(model.get_base_model() if isinstance(model, PeftModel) else model)
    layers = head_layers(base)
    if not layers:
        raise ValueError(f"{type(base).__name__} has no head to grow: give it one with replace_head.")
    if num_classes < base.num_classes:
        raise ValueError(
            f"num_classes: expected at least {base.num_classes}, the present number of classes, found {num_classes}. "
            "Use replace_head for a smaller head."
        )
    if num_classes == base.num_classes:
        return
    _check_no_adapter(base)
    for _, layer in layers:
        weight, bias = layer.weight, layer.bias
        rows = weight.new_empty(num_classes - len(weight), *weight.shape[1:]).normal_(std=0.01, generator=generator)
        layer.weight = _append_rows(weight, rows)
        if bias is not None:
            layer.bias = _append_rows(bias, bias.new_zeros(len(rows)))
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", num_classes)
    base.num_classes = num_classes
    set_class_names(base, None)


def _check_no_adapter(base: nn.Module) -> None:
    for name in head_names(base):
        if any(isinstance(module, BaseTunerLayer) for module in base.get_submodule(name).modules()):
            raise ValueError(
                f"The head {name} holds an adapter, which cannot grow: merge the adapter first, or train the whole "
                f"head with modules_to_save=[{name!r}]."
            )


def change_classes(model: nn.Module, names: Sequence[str], *, generator: torch.Generator | None = None) -> None:
    """Change the classes of a timm model in place to `names`. Classes that the model already has keep their rows.

    A row is the part of the head's weight and bias that belongs to one class. Rows of new classes are initialised as in
    :func:`replace_head`. Rows of classes that are not in `names` are removed. If the model has no class names, all old
    rows are removed. `model` may also be a PEFT model whose head is one of the `modules_to_save`, see
    :func:`grow_head`.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If `names` is empty or repeats a name, or if :func:`grow_head` rejects the model.

    Example:
        >>> from timm import create_model
        >>> model = create_model("mobilenetv2_035", num_classes=2)
        >>> set_class_names(model, ["cat", "dog"])
        >>> dog = model.classifier.weight[1]
        >>> change_classes(model, ["dog", "fox", "hare"])
        >>> torch.equal(model.classifier.weight[0], dog), class_names(model)
        (True, ['dog', 'fox', 'hare'])
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes: expected at least one name, and each name once, found {list(names)}")
    base = as_timm_model(model.get_base_model() if isinstance(model, PeftModel) else model)
    _check_no_adapter(base)
    old = {name: row for row, name in enumerate(class_names(base) or [])}
    new = [name for name in names if name not in old]
    added = dict(zip(new, range(base.num_classes, base.num_classes + len(new)), strict=True))
    grow_head(model, base.num_classes + len(new), generator=generator)
    rows = [{**old, **added}[name] for name in names]
    for _, layer in head_layers(base):
        for name in ("weight", "bias"):
            if (value := getattr(layer, name)) is not None:
                setattr(layer, name, nn.Parameter(value.detach()[rows], requires_grad=value.requires_grad))
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(rows))
    base.num_classes = len(rows)
    set_class_names(base, names)


def _append_rows(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.detach(), rows]), requires_grad=parameter.requires_grad)


def set_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Set the class names of a timm model, in the order of its outputs. None removes the names.

    The names are stored where timm looks for them, in ``model.pretrained_cfg["label_names"]``. `save_backbone` saves
    the names with the model, and `save_adapter` saves them with the adapter.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If the number of names is not the number of classes.

    Example:
        >>> from timm import create_model
        >>> model = create_model("mobilenetv2_035", num_classes=2)
        >>> set_class_names(model, ["cat", "dog"])
        >>> class_names(model)
        ['cat', 'dog']
    """
    timm_model = as_timm_model(model)
    if names is not None:
        _check_number(len(names), timm_model.num_classes)
    timm_model.pretrained_cfg["label_names"] = None if names is None else list(names)


def class_names(model: nn.Module) -> list[str] | None:
    """Return the class names of a timm model, in the order of its outputs.

    Return None if the model has no class names, or if timm did not build the model.

    Raises:
        ValueError: If the number of names is not the number of classes, for example after timm's `reset_classifier`.

    Example:
        >>> from timm import create_model
        >>> print(class_names(create_model("mobilenetv2_035")))
        None
    """
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if names is None:
        return None
    _check_number(len(names), cast(TimmModel, model).num_classes)
    return list(names.values()) if isinstance(names, dict) else list(names)


def _check_number(num_names: int, num_classes: int) -> None:
    if num_names != num_classes:
        raise ValueError(
            f"class names: expected one for each of the {num_classes} classes of the head, found {num_names}. "
            "Call set_class_names with the names of all classes, in the order of the outputs."
        )
