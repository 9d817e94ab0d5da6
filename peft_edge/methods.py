"""The methods: how each turns a source model into one whose trainable parameters are those of its update."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from peft import get_peft_model
from torch import nn

from peft_edge.backbones import head_names
from peft_edge.tuners.conv_lora import ConvLoraConfig

Prepare = Callable[[nn.Module, Mapping[str, Any]], nn.Module]


def _nothing(model: nn.Module, adapter: Mapping[str, Any]) -> nn.Module:
    return model.requires_grad_(False)


def _head(model: nn.Module, adapter: Mapping[str, Any]) -> nn.Module:
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def _everything(model: nn.Module, adapter: Mapping[str, Any]) -> nn.Module:
    return model.requires_grad_(True)


def _conv_lora(**fixed: Any) -> Prepare:
    def prepare(model: nn.Module, adapter: Mapping[str, Any]) -> nn.Module:
        return get_peft_model(model, ConvLoraConfig(**adapter, **fixed, modules_to_save=head_names(model)))

    return prepare


METHODS: dict[str, Prepare] = {
    "none": _nothing,
    "head": _head,
    "full": _everything,
    "lora": _conv_lora(),
    "lora-fa": _conv_lora(freeze_a=True),
    "dora": _conv_lora(use_dora=True),
}
"""By name; all but `none` train the head. Those with an adapter return a `PeftModel`."""


def prepare_model(model: nn.Module, method: str, adapter: Mapping[str, Any]) -> nn.Module:
    """Prepares a source model for training with a method.

    Args:
        model: A backbone from `load_backbone`; changed in place.
        method: A key of `METHODS`.
        adapter: Arguments of `ConvLoraConfig`, for the methods with an adapter.

    Returns:
        The model, in which exactly the parameters of the update require a gradient.

    Raises:
        ValueError: The method is unknown, or the adapter does not fit the model.
    """
    if method not in METHODS:
        nearest = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown method {method!r}; the nearest is {nearest!r}. There are: {', '.join(METHODS)}")
    return METHODS[method](model, adapter)
