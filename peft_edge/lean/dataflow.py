"""Which layers take a layer's output: seen while the model runs once on shapes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from peft_edge.lean.folding import base_layer

_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}

PRODUCT = "*"
"""A consumer that is no layer but a product."""
FUNCTION = ""
"""Any other consumer that is no layer: a function that the model calls, or whoever takes the model's own output."""


def consumers(model: nn.Module, *, training: bool = False, intermediates: bool = False) -> Mapping[str, list[str]]:
    """Runs a copy of the model on the meta device, and returns who takes each layer's output.

    A layer is a module without modules inside, a norm, or one that PEFT has put into the model. For each, by its name,
    there is one entry for every time that its output is taken: a layer's name, `PRODUCT` or `FUNCTION`. An activation
    inside a norm takes the norm's place.

    Args:
        model: takes images.
        training: whether it runs as in training.
        intermediates: whether timm's `forward_intermediates` runs instead of `forward`.

    Raises:
        Exception: what the model raises that cannot run so.
    """
    traced: Any = copy.deepcopy(model).to("meta").train(training)
    trace = _Trace()
    for name, module in traced.named_modules():
        if _is_layer(module):
            module.register_forward_pre_hook(trace.enter(name), with_kwargs=True)
            module.register_forward_hook(trace.leave(name), always_call=True)
    with torch.no_grad(), trace:
        run = traced.forward_intermediates if intermediates else traced
        trace.take(run(_images(traced)), FUNCTION)
    return trace.consumers


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Identity):
        # What it returns is what it was given.
        return False
    return isinstance(module, (_BatchNorm, BaseTunerLayer)) or not any(True for _ in module.children())


def _images(model: nn.Module) -> Tensor:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d))
        size = (conv.in_channels, *[224] * len(conv.kernel_size))
    return torch.empty(2, *size, device="meta", dtype=next(model.parameters()).dtype)


class _Trace(TorchFunctionMode):
    """Marks each layer's output with the layer's name, and notes who is given what is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers: defaultdict[str, list[str]] = defaultdict(list)
        self._layers: list[str] = []

    def take(self, values: Any, consumer: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (producer := getattr(value, "_made_by", None)) is not None:
                self.consumers[producer].append(consumer)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.take((args, kwargs), name)
            self._layers.append(name)

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._layers.pop()
            if isinstance(output, Tensor) and not _is_activation_inside(output, module, name):
                output._made_by = name  # type: ignore[attr-defined]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not self._layers:
            self.take((args, kwargs), PRODUCT if func.__name__ in _PRODUCTS else FUNCTION)
            result._made_by = None  # type: ignore[attr-defined]
        return result


def _is_activation_inside(output: Tensor, module: nn.Module, name: str) -> bool:
    """Whether a norm's output is what the activation inside of it has made."""
    return isinstance(base_layer(module), _BatchNorm) and (getattr(output, "_made_by", None) or "").startswith(
        f"{name}."
    )
