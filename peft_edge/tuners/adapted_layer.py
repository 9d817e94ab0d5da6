"""The base class of adapted layers: it merges adapters into the base layer and restores the base layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from timm.layers import Conv2dSame
from torch import Tensor, nn

from peft_edge._compat import has_plain_conv_forward
from peft_edge.lean.layers import LeanConvolution
from peft_edge.roles import Convolution

_CONVOLUTION_FORWARDS = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, LeanConvolution)}


def check_convolution(conv: Convolution, name: str) -> None:
    """Check that a layer computes a plain convolution with its weight.

    Args:
        conv: Convolution to check.
        name: Its name in the model, for the error message.

    Raises:
        ValueError: If the layer transforms its weight or input first.
    """
    is_plain = type(conv).forward in _CONVOLUTION_FORWARDS and has_plain_conv_forward(conv)
    # torch's parametrisations and weight_norm replace the parameter by a computed tensor.
    if not is_plain or "weight" not in dict(conv.named_parameters(recurse=False)):
        raise ValueError(
            f"Cannot adapt layer {name!r}: {type(conv).__name__} is not a plain convolution of its weight (it "
            "transforms the weight or the input first), so a merged adapter would compute something else. Leave it out "
            f"with exclude_modules=[{name!r}]."
        )


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model with its adapters.

    A subclass keeps its adapters in the `nn.ModuleDict`s that `adapter_layer_names` lists, and implements
    `_merged_tensors`.

    Args:
        base_layer: Layer to adapt; another PEFT tuner may have adapted it before.
    """

    if TYPE_CHECKING:
        # nn.Module declares all other attributes as Tensor or Module; those of PEFT are dictionaries and methods.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self._init_tuner(base_layer)
        self._unmerged: dict[str, Tensor] = {}

    def _init_tuner(self, base_layer: nn.Module) -> None:
        """Set the attributes that PEFT reads."""
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    @property
    def _adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def _applied_adapters(self) -> list[str]:
        """Return the names of the adapters that `forward` has to apply, in order."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self._adapters]

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str] | None) -> None:
        """Check that the layer can apply a different adapter to each sample of `x`; LoRA layers use PEFT's check.

        Raises:
            ValueError: If the number of names differs from the batch size, or an adapter is merged.
        """
        if adapter_names is None:
            return
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _base_tensor(self, name: str) -> Tensor | None:
        """Return a parameter or buffer of the base layer as it is without merged adapters."""
        tensor = getattr(self.get_base_layer(), name)
        # The model may have moved to another device after the merge.
        return self._unmerged[name].to(tensor.device) if name in self._unmerged else tensor

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return parameters and buffers of the base layer, by name, as they are with `adapters` merged in turn."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer.

        Args:
            safe_merge: Check the result for NaN and infinity before the base layer changes.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If `safe_merge` finds a value that is not finite.
            RuntimeError: If an adapter has a bias and the base layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._adapters]
        if not names:
            return
        base = self.get_base_layer()
        with torch.no_grad():
            merged = self._merged_tensors([*self.merged_adapters, *names])
        for name, value in merged.items() if safe_merge else ():
            if not torch.isfinite(value).all():
                raise ValueError(f"NaNs detected in the merged {name}. The adapter {names[-1]} seems to be broken")
        self._unmerged = self._unmerged or {name: getattr(base, name).data for name in merged}
        for name, value in merged.items():
            tensor = getattr(base, name)
            # A copy, since an unchanged value may still be the base layer's or the adapter's own tensor.
            tensor.data = value.detach().to(tensor.dtype, copy=True)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base layer's own tensors, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, value in self._unmerged.items():
            tensor = getattr(self.get_base_layer(), name)
            tensor.data = value.to(tensor)
        self._unmerged = {}
        self.merged_adapters.clear()
