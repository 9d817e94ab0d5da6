"""Batches in which every sample has its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


@contextmanager
def adapter_names_for_layers(model: nn.Module, adapter_names: list[str] | None) -> Iterator[None]:
    """While it is open, every adapted layer is called with `adapter_names`; None changes nothing.

    PEFT's own for LoRA knows adapters by `lora_A` alone, and would refuse one of norms.

    Args:
        model: the adapted model, in eval mode.
        adapter_names: one adapter for each sample, `"__base__"` for none.

    Raises:
        ValueError: if the model is in training mode, or has no adapter of such a name.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    known = {"__base__"}.union(*(layer._get_available_adapters() for layer in layers))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    hook = partial(_pass_adapter_names, names=adapter_names)
    wrapped = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in wrapped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_adapter_names(layer: BaseTunerLayer, x: Tensor, adapter_names: Sequence[str] | None) -> None:
    """Checks that a layer can use another adapter for each sample.

    Args:
        layer: the layer.
        x: its input, (B, ...).
        adapter_names: B names, or None.

    Raises:
        ValueError: if their number is not B, or an adapter is merged.
    """
    if adapter_names is None:
        return
    if len(adapter_names) != len(x):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
