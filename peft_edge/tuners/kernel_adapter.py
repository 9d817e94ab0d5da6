"""Batches in which every sample has its own adapter.

What adapters of convolutions have in common: the plain convolution, and merging into its kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from timm.layers import Conv2dSame
from torch import Tensor, nn

from peft_edge.lean.layers import LeanConvolution


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


_PLAIN_FORWARDS = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, LeanConvolution)}
_PLAIN_CONV_FORWARDS = {cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def check_convolution(conv: Any, name: str) -> None:
    """Checks that a layer is a plain convolution of its weight.

    Args:
        conv: a `Conv1d`, `Conv2d` or `Conv3d`.
        name: its name in the model.

    Raises:
        ValueError: if it is not, naming it.
    """
    is_plain = type(conv).forward in _PLAIN_FORWARDS and type(conv)._conv_forward in _PLAIN_CONV_FORWARDS
    # A weight that is no parameter is computed from others: torch's parametrisations and weight_norm.
    if not is_plain or "weight" not in conv._parameters:
        raise ValueError(
            f"Cannot adapt layer {name!r}: {type(conv).__name__} is not a plain convolution of its weight (it "
            "transforms the weight or the input first), so a merged adapter would compute something else. Leave it out "
            f"with exclude_modules=[{name!r}]."
        )


class KernelAdapter(BaseTunerLayer):
    """A layer whose adapters can be merged into the kernel of the convolution that it wraps."""

    _unmerged: tuple[Tensor, Tensor | None] | None = None

    def _own_adapters(self) -> Iterable[str]:
        """The adapters that this layer has."""
        raise NotImplementedError

    def _compose(self, adapters: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias of the base layer with `adapters` applied in turn, at the adapters' precision."""
        raise NotImplementedError

    def _base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias of the base layer without any adapter."""
        conv = self.get_base_layer()
        if self._unmerged is None:
            return conv.weight, conv.bias
        weight, bias = self._unmerged
        # The model may have moved since.
        return weight.to(conv.weight.device), None if bias is None else bias.to(conv.weight.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapters' kernels into the base layer.

        Args:
            safe_merge: check the result for NaN and infinity before the base layer changes.
            adapter_names: what to merge, by default the active adapters.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite.
            RuntimeError: if the adapters have a bias and the base layer has none.
        """
        own = self._own_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        if not names:
            return
        conv = self.get_base_layer()
        with torch.no_grad():
            kernel, bias = self._compose([*self.merged_adapters, *names])
            if bias is not None and conv.bias is None:
                raise RuntimeError("Impossible to merge an adapter with a bias because the base layer has no bias.")
            for value in (kernel, bias) if safe_merge else ():
                if value is not None and not torch.isfinite(value).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
            if self._unmerged is None:
                self._unmerged = (conv.weight.data, None if conv.bias is None else conv.bias.data)
            conv.weight.data = kernel.to(conv.weight.dtype)
            if bias is not None:
                conv.bias.data = bias.to(conv.bias.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base layer's own parameters back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        conv = self.get_base_layer()
        weight, bias = self._unmerged
        conv.weight.data = weight.to(conv.weight)
        if bias is not None:
            conv.bias.data = bias.to(conv.bias)
        self._unmerged = None
        self.merged_adapters.clear()
