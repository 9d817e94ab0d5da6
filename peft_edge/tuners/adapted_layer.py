"""Base class of the adapted layers: merge adapters into the base layer, and restore the base layer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from peft_edge._compat import has_plain_conv_forward
from peft_edge.lean.layers import LeanBatchNorm, LeanConvolution
from peft_edge.roles import is_convolution

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, LeanConvolution)
_BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, BatchNormAct2d, LeanBatchNorm)


def check_plain(layer: nn.Module, name: str) -> None:
    """Raise a `ValueError` if a convolution or BatchNorm layer called `name` has a forward pass of its own."""
    if is_convolution(layer):
        expected = "convolution of its weight"
        is_plain = type(layer).forward in {cls.forward for cls in _CONVOLUTIONS} and has_plain_conv_forward(layer)
        # torch's parametrisations and weight_norm replace the parameter by a computed tensor.
        is_plain = is_plain and "weight" in dict(layer.named_parameters(recurse=False))
    else:
        expected, is_plain = "batch normalisation", type(layer).forward in {cls.forward for cls in _BATCH_NORMS}
    if not is_plain:
        raise ValueError(
            f"Cannot adapt layer {name!r}: {type(layer).__name__} is not a plain {expected}, so a merged adapter would "
            f"compute something else. Leave it out with exclude_modules=[{name!r}]."
        )


def rows_by_adapter(adapter_names: list[str]) -> dict[str, list[int]]:
    """Return a dict from adapter names to the indices of their samples in a mixed batch."""
    return {adapter: [row for row, name in enumerate(adapter_names) if name == adapter] for adapter in adapter_names}


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model with its adapters.

    A subclass stores its adapters in the `nn.ModuleDict` attributes that `adapter_layer_names` lists, and implements
    `_merged_tensors`. `base_layer` may be a layer that another PEFT tuner adapted.
    """

    if TYPE_CHECKING:
        # nn.Module declares all other attributes as Tensor or Module, but PEFT sets dictionaries.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}
        if isinstance(self, LoraLayer):
            LoraLayer.__init__(self, base_layer)  # sets the attributes that PEFT reads in all LoRA layers

    @property
    def _adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def _applied_adapters(self) -> list[str]:
        """Return the names of the adapters that `forward` must apply, in order."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self._adapters]

    def _base_tensor(self, name: str) -> Tensor | None:
        """Return the value of a base layer's parameter or buffer before adapters were merged into it."""
        tensor = getattr(self.get_base_layer(), name)
        # The model may have moved to another device after the merge.
        return self._unmerged[name].to(tensor.device) if name in self._unmerged else tensor

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return a dict from names of base-layer tensors to their values after merging `adapters` in this order."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, by default the active ones, into the base layer.

        With `safe_merge=True`, the result is checked for NaN and infinity before the base layer changes.

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
        # A second merge may change a tensor, such as the bias, that the first one left alone.
        self._unmerged = {name: getattr(base, name).data for name in merged} | self._unmerged
        for name, value in merged.items():
            tensor = getattr(base, name)
            # Copy: `value` may be the base layer's or the adapter's tensor, whose memory the result must not share.
            tensor.data = value.detach().to(tensor.dtype, copy=True)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the tensors of before the first merge, in the current dtype and on the current device."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, value in self._unmerged.items():
            tensor = getattr(self.get_base_layer(), name)
            tensor.data = value.to(tensor)
        self._unmerged = {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        tuner = type(self).__module__.split(".")[-2]
        return f"{tuner}.{super().__repr__()}"
