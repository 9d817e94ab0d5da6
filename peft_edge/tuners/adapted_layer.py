"""Base class of the adapted layers: merge adapters into the base layer, and restore the base layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from peft_edge._compat import has_hooks, has_plain_conv_forward
from peft_edge.lean.layers import LeanBatchNorm, LeanConvolution
from peft_edge.roles import is_convolution

FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""BatchNorm classes with constant statistics. timm's `freeze` and `freeze_batch_norm_2d` create such layers."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, LeanConvolution)
_BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, LeanBatchNorm, *FROZEN_NORMS)

_PLAIN_FORWARDS = {cls.forward for cls in (*_CONVOLUTIONS, *_BATCH_NORMS)}

_READ_BY_FUSING = {
    *("running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "num_features"),
    *(
        "in_channels",
        "out_channels",
        "stride",
        "padding",
        "padding_mode",
        "dilation",
        "groups",
        "kernel_size",
        "transposed",
    ),
    "output_padding",
}


def check_plain(layer: nn.Module, name: str) -> None:
    """Raise a `ValueError` unless `layer` is an ordinary convolution or batch normalisation.

    The error message refers to the layer as `name`.
    """
    if is_convolution(layer):
        expected = "convolution of its weight"
        is_plain = type(layer).forward in {cls.forward for cls in _CONVOLUTIONS} and has_plain_conv_forward(layer)
        # torch's parametrisations and weight_norm replace the parameter `weight` by a computed tensor.
        is_plain = is_plain and "weight" in dict(layer.named_parameters(recurse=False))
    else:
        expected = "batch normalisation"
        is_plain = type(layer).forward in {cls.forward for cls in _BATCH_NORMS}
    if not is_plain:
        raise ValueError(
            f"Cannot adapt layer {name!r}: {type(layer).__name__} is not a plain {expected}, so a merged adapter would "
            f"compute something else. Leave it out with exclude_modules=[{name!r}]"
            + ("." if is_convolution(layer) else f", or train and save it whole with modules_to_save=[{name!r}].")
        )


def add_changes(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Combine tensors by task arithmetic: return base + the sum of weights[i] * (tensors[i] - base), arXiv 2212.04089.

    >>> add_changes(torch.tensor(1.0), [torch.tensor(2.0), torch.tensor(5.0)], [1.0, 0.5])
    tensor(4.)
    """
    return base + sum(weight * (tensor - base) for tensor, weight in zip(tensors, weights, strict=True))


def rows_by_adapter(adapter_names: list[str]) -> dict[str, list[int]]:
    """Return a dict from each adapter name to the indices of the samples that use this adapter.

    Sample i uses `adapter_names[i]`.
    """
    return {adapter: [row for row, name in enumerate(adapter_names) if name == adapter] for adapter in adapter_names}


def replaces_forward(layer: nn.Module) -> bool:
    """Return whether `forward` or `_conv_forward` was replaced on the instance `layer`, not on its class."""
    attributes = layer.__dict__
    return "forward" in attributes or "_conv_forward" in attributes


def is_observed(layer: nn.Module) -> bool:
    """Return whether `layer` has hooks or a replaced forward pass, which run only if `layer` itself is called."""
    return has_hooks(layer) or replaces_forward(layer)


def call_with_forward(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call `layer(x)` with `forward` in place of the layer's own forward pass. The hooks of the layer run.

    Accelerate's hooks replace `layer.forward` by a function that loads the weights and then calls `_old_forward`. If
    the layer has such a hook, `forward` takes the place of `_old_forward`.
    """
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    attributes = vars(layer)
    before = {key: attributes[key] for key in (name,) if key in attributes}
    attributes[name] = forward
    try:
        return layer(x)
    finally:
        del attributes[name]
        attributes.update(before)


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """If Accelerate has offloaded weights of `modules`, load these weights, and offload them after the context."""
    hooks: list[tuple[nn.Module, ModelHook]] = [(m, m._hf_hook) for m in modules if hasattr(m, "_hf_hook")]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)


def sum_of_bits(tensor: Tensor) -> tuple[torch.dtype, int]:
    """Return the dtype of a tensor and the sum of its bit patterns, to detect later changes of the tensor."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
    return tensor.dtype, int(real.detach().view(bits).sum(dtype=torch.int64))


def innermost_layer(layer: nn.Module) -> nn.Module:
    """Return the layer inside the nested tuner layers of `layer`, or `layer` itself if it is not a tuner layer.

    PEFT's `get_base_layer` is not used, because of blocks that have a child called `base_layer`. For such a block, it
    would return the child instead of the block.
    """
    inner: Any = layer
    while isinstance(inner, BaseTunerLayer):
        inner = inner.base_layer
    return inner


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model with its adapters.

    A subclass lists names of attributes in `adapter_layer_names`. Each of these attributes is an `nn.ModuleDict` from
    adapter name to a part of the adapter. A subclass also implements `_changed_tensor` and `_merged_tensors`.
    `base_layer` may be a layer of another PEFT tuner, which contains the layer of the base model.
    """

    def __getattr__(self, name: str) -> Any:  # Any, because PEFT stores dictionaries in some attributes
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in ("weight", "bias") and "base_layer" in self._modules:
                self._effective_tensor(
                    "weight" if name == "weight" else "bias"
                )  # nn.Module has replaced the error of the property `weight` or `bias`, so raise that error again
            if name in _READ_BY_FUSING and "base_layer" in self._modules:
                # Do not return the base layer's attribute, because code that fuses layers would ignore the adapter.
                raise AttributeError(
                    f"layer {self.target_name!r} is adapted and has no {name!r}: fusing or reparametrising it would "
                    "lose the adapter. Call merge_and_unload() first, or read it from get_base_layer()."
                ) from error
            raise

    def __setattr__(self, name: str, value: Any) -> None:  # Any, as in PyTorch
        if name in ("weight", "bias"):
            raise AttributeError(self._not_assignable(name))
        if name == "base_layer" and isinstance(value, nn.Module):
            self.add_module(name, value)  # checks the new base layer, unlike nn.Module.__setattr__
        else:
            super().__setattr__(name, value)

    def _not_assignable(self, name: str) -> str:
        return (
            f"layer {self.target_name!r} is adapted: its {name} cannot be assigned, as fusing, pruning or "
            "reparametrising would. Call merge_and_unload() first, or change get_base_layer()."
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter whose name does not start with `weight` or `bias`.

        Names with these prefixes, such as the `weight_orig` of torch's pruning, are rejected, because an adapted layer
        cannot be pruned.

        Raises:
            AttributeError: If the name starts with `weight` or `bias`.
        """
        if name.startswith(("weight", "bias")):
            raise AttributeError(self._not_assignable(name.partition("_")[0]))
        super().register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child module. Functions that fuse, convert or freeze layers call this method with a new base layer.

        Raises:
            ValueError: If the child is a new base layer with which the adapter cannot be used.
        """
        old = self._modules.get("base_layer")
        if name == "base_layer" and old is not None and module is not None and module is not old:
            module = self._converted_base_layer(old, module)
        super().add_module(name, module)

    def _converted_base_layer(self, old: nn.Module, new: nn.Module) -> nn.Module:
        """Return the layer to use as base layer when a caller replaces the base layer `old` by `new`.

        Raises:
            ValueError: If the adapter cannot be used with `new`.
        """
        if innermost_layer(old) is innermost_layer(new):
            return new  # PEFT wraps the base layer in another tuner, or unwraps it
        raise ValueError(
            f"Cannot replace the base layer of {self.target_name!r} by {type(new).__name__}: its adapter was made for "
            "the old weights. Call merge_and_unload() before you fuse, quantise or replace layers."
        )

    def check_base_layer(self) -> None:
        """Raise a `ValueError` if the base layer is no longer an ordinary convolution or batch normalisation."""
        base = self.get_base_layer()
        if type(base).forward not in _PLAIN_FORWARDS:
            # `add_module` rejects such base layers, but torch's quantisation does not call it to replace a layer.
            found = f"{type(base).__module__}.{type(base).__name__}"
            raise ValueError(
                f"The base layer of {self.target_name!r} was replaced by {found}, which the adapter does not fit. Call "
                "merge_and_unload() before you quantise or convert the network."
            )

    @property
    def weight(self) -> Tensor:
        """The weight with which the layer computes its output: the base layer's weight, changed by the active adapters.

        Code that fuses or reparametrises layers reads this attribute. If adapters change the weight, the result is not
        the parameter of the base layer.

        Raises:
            AttributeError: If there is no single weight with the effect of the active adapters.
        """
        return self._effective_tensor("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias with which the layer computes its output: the base layer's bias, changed by the active adapters."""
        return self._effective_tensor("bias")

    def _effective_tensor(self, name: Literal["weight", "bias"]) -> Any:  # a Tensor, or None for a missing bias
        adapters, tensor = self._applied_adapters(), getattr(self.get_base_layer(), name)
        if not adapters:
            return tensor
        if isinstance(self.base_layer, BaseTunerLayer):
            raise AttributeError(
                f"layer {self.target_name!r} is adapted by several tuners, and has no {name!r}. Call "
                "merge_and_unload() first, or read it from get_base_layer()."
            )
        changed = self._changed_tensor(name, adapters)
        return tensor if changed is None else changed.to(tensor)

    def _changed_tensor(self, name: Literal["weight", "bias"], adapters: list[str]) -> Tensor | None:
        """Return the base layer's weight or bias, changed by `adapters`, or None if they do not change this tensor."""
        raise NotImplementedError

    def __init__(self, base_layer: nn.Module, target_name: str = "") -> None:
        super().__init__()
        self.target_name = target_name
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}
        self._fingerprints: dict[str, tuple[torch.dtype, int]] = {}
        if isinstance(self, LoraLayer):
            LoraLayer.__init__(self, base_layer)  # sets the attributes of LoRA layers that PEFT reads

    def get_base_layer(self) -> Any:  # Any, as in PEFT: the layer's type depends on the tuner
        """Return the layer of the base model, without the layers that PEFT tuners have put around it."""
        return innermost_layer(self.base_layer)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this method for tensors that were loaded with `low_cpu_mem_usage`. PEFT's version also casts the
        # tensors to the dtype of the base layer, which would round them if the base layer is in half precision.
        tensors = self.get_base_layer().state_dict().values()
        target = device or next((tensor.device for tensor in tensors if tensor.is_floating_point()), None)
        for name in self.adapter_layer_names if target is not None and target.type != "meta" else ():
            adapters = getattr(self, name)
            if adapter_name in adapters and not any(p.is_meta for p in adapters[adapter_name].parameters()):
                adapters[adapter_name].to(target)

    @property
    def _adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def _applied_adapters(self) -> list[str]:
        """Return the names of the adapters that `forward` applies, in the order of application.

        The list is empty if adapters are merged or disabled.
        """
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self._adapters]

    def _base_tensor(self, name: str) -> Tensor | None:
        """Return the base layer's parameter or buffer `name` with the values from before any merge.

        The result is None for a missing bias.
        """
        tensor = getattr(self.get_base_layer(), name)
        # The model may have moved to another device after the merge.
        return self._unmerged[name].to(tensor.device) if name in self._unmerged else tensor

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return the tensors that the base layer has after `adapters` are merged in the given order, as a dict by name.

        Tensors that the adapters never change may be missing.
        """
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, by default the active ones, into the base layer.

        With `safe_merge=True`, the result is checked for NaN and infinity before the base layer changes.

        Raises:
            ValueError: If `safe_merge` is True and a merged value is not finite in the base layer's dtype, or if the
                base layer computes its weight in each forward pass (pruning, parametrisation).
            RuntimeError: If an adapter has a bias and the base layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._adapters]
        if not names:
            return
        merged = self.check_merge(names, safe_merge=safe_merge)
        base = self.get_base_layer()
        # If an earlier merge has already stored the original values of a tensor, keep these. Store the values of the
        # tensors that no earlier merge has changed.
        self._unmerged = {name: getattr(base, name).data for name in merged} | self._unmerged
        for name, value in merged.items():
            tensor = getattr(base, name)
            # Copy `value`, because it may share memory with a tensor of the base layer or of an adapter.
            tensor.data = value.detach().to(tensor.dtype, copy=True)
            self._fingerprints[name] = sum_of_bits(tensor)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: list[str], *, safe_merge: bool) -> dict[str, Tensor]:
        """Return the tensors that the base layer would have after `merge`, and raise the errors that `merge` raises.

        `adapter_names` are merged in addition to the adapters that are already merged. The layer does not change.
        """
        base = self.get_base_layer()
        self.check_base_layer()
        with torch.no_grad():
            merged = self._merged_tensors([*self.merged_adapters, *adapter_names])
        self._check_plain_tensors(merged, "merge")
        for name, value in merged.items() if safe_merge else ():
            if not torch.isfinite(value.to(getattr(base, name).dtype)).all():
                raise ValueError(
                    f"NaNs detected in the merged {name} of layer {self.target_name!r}, or values that "
                    f"{getattr(base, name).dtype} cannot hold. The adapter {adapter_names[-1]} seems to be broken"
                )
        return merged

    def _check_plain_tensors(self, names: dict[str, Tensor], action: str) -> None:
        base = self.get_base_layer()
        computed = [name for name in names if name not in {**base._parameters, **base._buffers}]
        if computed:
            raise ValueError(
                f"Cannot {action} layer {self.target_name!r}: {type(base).__name__} computes its {computed[0]} in each "
                "forward pass, which would overwrite the result. Remove the pruning or parametrisation first "
                "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)."
            )

    def unmerge(self) -> None:
        """Restore the tensors of the base layer to their exact values before the merge.

        If a tensor was changed after the merge, for example by an optimizer step, the method keeps that change, and
        subtracts only the changes of the adapters from the tensor. If the dtype of a tensor was changed, the old values
        are restored in the new dtype.

        Raises:
            ValueError: If the base layer computes its weight in each forward pass, as with pruning or a
                parametrisation.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        self._check_plain_tensors(self._unmerged, "unmerge")
        changed = {name for name, value in self._fingerprints.items() if sum_of_bits(getattr(base, name)) != value}
        with torch.no_grad():
            merged = self._merged_tensors(self.merged_adapters) if changed else {}
        for name, value in self._unmerged.items():
            tensor = getattr(base, name)
            value = value.to(tensor.device)
            if name in changed and tensor.dtype == self._fingerprints[name][0]:
                value = tensor.data - (merged[name] - value)
            tensor.data = value.to(tensor)
        self._unmerged, self._fingerprints = {}, {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        tuner = type(self).__module__.split(".")[-2]
        return f"{tuner}.{super().__repr__()}"
