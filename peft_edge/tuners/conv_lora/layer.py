"""Layers of ConvLoRA: a convolution with low-rank adapters, and the adapted BatchNorm layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, dora, variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.func import functional_call

from peft_edge._compat import BatchNorm
from peft_edge.functional.convolution import convolution, lean_convolution, pad
from peft_edge.functional.lowrank import dora_scale, lowrank_conv2d, lowrank_keeps_input, lowrank_kernel
from peft_edge.functional.recompute import memory_format_of
from peft_edge.lean.inplace_norm import mark_overwritable
from peft_edge.tuners.adapted_layer import (
    AdaptedLayer,
    call_with_forward,
    check_plain,
    is_observed,
    loaded,
    replaces_forward,
    rows_by_adapter,
)
from peft_edge.tuners.norm import BatchNormLayer

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_HALF = (torch.float16, torch.bfloat16)
_DORA_VARIANTS = {1: variants.DoraConv1dVariant, 2: variants.DoraConv2dVariant, 3: variants.DoraConv3dVariant}


def check_rank(r: int, name: str) -> None:
    """Raise a `ValueError` unless the rank `r` is a positive integer. The error message names the layer `name`."""
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r} (layer {name!r})")


def _runs_in_half(weight: Tensor) -> bool:
    """Return whether a convolution with `weight` runs in half precision, because of the weight's dtype or autocast."""
    device = weight.device.type
    # Lean training (`peft_edge.lean`) traces the model on the meta device, for which torch has no autocast.
    is_cast = weight.dtype == torch.float32 and is_autocast_available(device) and torch.is_autocast_enabled(device)
    runs_in = torch.get_autocast_dtype(device) if is_cast else weight.dtype
    return runs_in in _HALF


class ConvLoraLayer(AdaptedLayer, LoraLayer):
    """LoRA for convolutions: y = conv(x; W + (alpha/r) B A) + b. W is frozen, and A and B are trained.

    If the convolution has g groups, the matrix B A has the shape (C_out, C_in/g * kh * kw). It is reshaped to (C_out,
    C_in/g, kh, kw), the shape of W. An adapter has

    - `lora_A[name].weight`: A, shape (r, C_in/g, kh, kw),
    - `lora_B[name].weight`: B, shape (C_out, r, 1, 1),
    - `lora_magnitude_vector[name].weight`: m, shape (1, C_out, 1, 1), only with `use_dora=True`.

    For g = 1, shapes and outputs equal those of PEFT's LoRA convolution. For a depthwise convolution (g = C_in), all
    channels share the r spatial kernels in A.

    DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) scales each output channel of W' = W + (alpha/r) B A to the trained
    norm m: y = conv(x; (m / ||W'||) W') + b. The backward pass treats ||W'|| as a constant (section 4.3).

    By default, the layer adds the update (alpha/r) B A to the kernel W, and runs one convolution, see `lowrank_conv2d`.
    In half precision, including autocast, the sum would lose small updates. In this case, the layer runs one
    convolution with W and one with the update.

    Hooks of the base layer run, and receive the adapted output. If `forward` of the base layer was replaced on the
    instance, the replacement runs.

    `base_layer` is a `Conv1d`, `Conv2d`, `Conv3d` or timm's `Conv2dSame`, or another PEFT tuner's layer around such a
    convolution. With `use_rslora=True`, the scale is alpha / sqrt(r). `adapter_name`, `config`, `r` and `lora_alpha`
    are those of the first adapter; `update_layer` adds further adapters. Error messages contain `target_name`, the name
    of the layer.

    Raises:
        ValueError: If the rank is not a positive integer, or if the base layer is not a plain convolution, for example
            because it standardises its weight.

    Example:
        >>> import torch
        >>> from peft_edge import ConvLoraConfig, ConvLoraLayer
        >>> layer = ConvLoraLayer(torch.nn.Conv2d(8, 16, 3), "default", ConvLoraConfig(), r=2, lora_alpha=4)
        >>> layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape
        (torch.Size([2, 8, 3, 3]), torch.Size([16, 2, 1, 1]))
        >>> layer(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        target_name: str = "",
        **kwargs: object,
    ) -> None:
        super().__init__(base_layer, target_name)
        check_plain(self.get_base_layer(), target_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """The class of the LoRA variant for each combination of enabled options. None means plain LoRA."""
        return {(): None, ("use_dora",): _DORA_VARIANTS[len(self.get_base_layer().kernel_size)]}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs: object
    ) -> None:
        """Add an adapter, or initialise an existing adapter again. `r` must be a positive integer."""
        check_rank(r, target_name)
        conv = self.get_base_layer()
        if config.lora_bias and conv.bias is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(conv).__name__} has no bias. "
                f"This means that merging LoRA weights won't be possible (layer {target_name!r}).",
                PeftWarning,
                stacklevel=2,
            )
        variant = self.resolve_lora_variant(config=config)
        if variant is not None:
            self.lora_variant[adapter_name] = variant
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)
        conv_cls = _CONVOLUTIONS[len(conv.kernel_size)]
        self.lora_A[adapter_name] = conv_cls(conv.in_channels // conv.groups, r, conv.kernel_size, bias=False)
        self.lora_B[adapter_name] = conv_cls(r, conv.out_channels, 1, bias=config.lora_bias)
        # LoRA-GA initialises only linear layers. If it is chosen, convolutions get the default initialisation, as in
        # PEFT.
        init = True if config.init_lora_weights == "lora_ga" else config.init_lora_weights
        if init:
            self.reset_lora_parameters(adapter_name, init)
        with loaded(conv):
            BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
            if variant is not None:
                variant.init(self, adapter_name=adapter_name, config=config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, adapter_names: list[str] | None = None, **kwargs: object) -> Tensor:
        """Compute y = conv(x; W + (alpha/r) B A) + b with the active adapters, for x of shape (batch, C_in, *size).

        `adapter_names` selects one adapter per sample, see `peft_edge.tuners.injection.pass_adapter_names`.
        """
        self.check_base_layer()
        adapters = self._applied_adapters()
        is_common = adapter_names is None and self._is_fused(adapters) and x.dim() == self.get_base_layer().weight.dim()
        if is_common and not self._is_observed(adapters[0]):
            # The common case: one adapter on a frozen convolution without hooks.
            return self._fused_forward(x, adapters[0])
        self._check_forward_args(x, adapter_names=adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or not (adapters or adapter_names):
            return self.base_layer(x, *args, **kwargs)
        names = adapters if adapter_names is None else [name for name in self._adapters if name in adapter_names]
        with loaded(*(module for name in names for module in self._adapter_modules(name))):
            if isinstance(self.base_layer, BaseTunerLayer):
                y = self.base_layer(x, *args, **kwargs)
                if adapter_names is None:
                    return self._add_branches(x, y, adapters)
                for adapter, rows in rows_by_adapter(adapter_names).items():
                    y[rows] = self._add_branches(x[rows], y[rows], [adapter] if adapter in self.lora_A else [])
                return y
            # Hooks and a replaced forward pass of the base layer run only if the base layer itself is called.
            conv = self.base_layer
            if replaces_forward(conv) and not hasattr(conv, "_hf_hook"):
                return self._by_rows(self._call_replaced_forward, x, adapters, adapter_names)
            forward = partial(self._by_rows, self._adapted_forward, adapters=adapters, adapter_names=adapter_names)
            return call_with_forward(conv, forward, x) if is_observed(conv) else forward(x)

    def _is_observed(self, adapter: str) -> bool:
        """Return True if the base layer has hooks or a replaced forward pass, or if Accelerate offloads `adapter`."""
        return is_observed(self.base_layer) or any("_hf_hook" in vars(m) for m in self._adapter_modules(adapter))

    def _adapter_modules(self, adapter: str) -> list[nn.Module]:
        modules = [self.lora_A[adapter], self.lora_B[adapter]]
        return [*modules, self.lora_magnitude_vector[adapter]] if self.use_dora[adapter] else modules

    def _by_rows(
        self,
        function: Callable[[Tensor, list[str]], Tensor],
        x: Tensor,
        adapters: list[str],
        adapter_names: list[str] | None,
    ) -> Tensor:
        """Apply `function` to `x` with `adapters`, or with one adapter for each sample.

        If `adapter_names` is None, return `function(x, adapters)`. Otherwise, sample i uses only `adapter_names[i]`:
        `function` is called once for each of these adapters, with the samples of this adapter. The outputs are in the
        order of `x`.
        """
        if adapter_names is None:
            return function(x, adapters)
        rows = rows_by_adapter(adapter_names)
        parts = {name: function(x[own], [name] if name in self.lora_A else []) for name, own in rows.items()}
        y = torch.cat(list(parts.values()))
        order = torch.tensor([row for own in rows.values() for row in own], device=y.device)
        return y[order.argsort()]

    def _adapted_forward(self, x: Tensor, adapters: list[str]) -> Tensor:
        """Return the output of the layer with `adapters`, without calling the base layer and its hooks."""
        conv = self.get_base_layer()
        is_batch = x.dim() == conv.weight.dim()
        if is_batch and self._is_fused(adapters):
            return self._fused_forward(x, adapters[0])
        if not adapters or self._has_two_branches(adapters) or _runs_in_half(conv.weight):
            return self._add_branches(x, type(conv).forward(conv, x), adapters)
        # The remaining cases are those that `_fused_forward` does not support: several adapters, a trainable or complex
        # base kernel, cached DoRA norms, or an `x` without a batch dimension.
        return self._convolve(x, *self._compose(adapters))

    def _call_replaced_forward(self, x: Tensor, adapters: list[str]) -> Tensor:
        """Call the base layer, whose `forward` was replaced on the instance, with the adapted kernel.

        If the base layer computes its weight (pruning, parametrisation), or if `_has_two_branches` returns True, call
        the base layer with its own kernel instead, and add the outputs of the adapters.
        """
        conv = self.get_base_layer()
        if not adapters or self._has_two_branches(adapters) or "weight" not in conv._parameters:
            return self._add_branches(x, conv(x), adapters)
        kernel, bias = self._compose(adapters)
        tensors = {"weight": kernel.to(conv.weight.dtype)}
        if bias is not None:
            tensors["bias"] = bias.to(conv.weight.dtype)
        return functional_call(conv, tensors, (x,))

    def _fused_forward(self, x: Tensor, adapter: str) -> Tensor:
        conv = self.get_base_layer()
        bias = self._add_bias(conv.bias, adapter)
        bias = None if bias is None else bias.to(conv.weight.dtype)
        x, geometry = pad(conv, x)
        weight, is_half = conv.weight, _runs_in_half(conv.weight)
        if is_half:
            # Run one convolution with the kernel and one with the update. In half precision, the sum of kernel and
            # update would lose the update.
            base_y, weight = lean_convolution(x, weight, bias, geometry), torch.zeros_like(weight)
            bias = None
        y = lowrank_conv2d(
            x,
            weight,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            geometry=geometry,
            bias=bias,
            magnitude=self.lora_magnitude_vector[adapter].weight if self.use_dora[adapter] else None,
            recompute=getattr(conv, "lets_recompute", False) and not is_half,
        )
        return mark_overwritable(base_y + y if is_half else y, self)

    @property
    def keeps_input(self) -> bool:
        """Whether autograd saves the layer's input for the backward pass, given the mode and the active adapters."""
        adapters = self._applied_adapters()
        if not adapters:
            return getattr(self.base_layer, "keeps_input", True)
        if not self._is_fused(adapters):
            return True
        (adapter,) = adapters
        return lowrank_keeps_input(
            self.get_base_layer().groups,
            trains_a=self.lora_A[adapter].weight.requires_grad,
            trains_b=self.lora_B[adapter].weight.requires_grad,
            trains_magnitude=self.use_dora[adapter] and self.lora_magnitude_vector[adapter].weight.requires_grad,
        )

    def _has_two_branches(self, adapters: list[str]) -> bool:
        """Return whether `_add_branches` must run separate convolutions for the base layer and for each adapter.

        The result is True with dropout in training mode, and if another tuner adapts `base_layer`. It is also True in
        half precision, except for a single adapter without DoRA on a frozen kernel, which `_fused_forward` handles.
        """
        has_dropout = self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapters)
        if has_dropout or isinstance(self.base_layer, BaseTunerLayer):
            return True
        weight = self.get_base_layer().weight
        is_plain = len(adapters) == 1 and not self.use_dora[adapters[0]] and not weight.requires_grad
        return _runs_in_half(weight) and not is_plain

    def _is_fused(self, adapters: list[str]) -> bool:
        """Return whether `_fused_forward` supports `adapters`.

        It supports a single adapter on a frozen kernel of real numbers. `_has_two_branches` must be False, and the
        norms of DoRA must not be cached.
        """
        weight = self.get_base_layer().weight
        is_single = len(adapters) == 1 and not weight.requires_grad and not weight.is_complex()
        if not is_single or self._has_two_branches(adapters):
            return False
        return not (self.use_dora[adapters[0]] and self._caches_dora())

    def _caches_dora(self) -> bool:
        """Return whether to use cached norms ||W'|| for DoRA.

        They are used in eval mode while `peft.helpers.DoraCaching` is on.
        """
        return dora.ENABLE_DORA_CACHING and not self.training

    def _add_branches(self, x: Tensor, y: Tensor, adapters: list[str]) -> Tensor:
        """Return y plus the convolutions of `x` with the kernel updates of `adapters`. y is the base layer's output."""
        kernel, dtype = None, y.dtype
        for end, adapter in enumerate(adapters, start=1):
            if any(self.use_dora[name] for name in adapters[:end]):
                kernel = self._compose(adapters[: end - 1])[0] if kernel is None else kernel
                next_kernel, _ = self._compose(adapters[:end])
                change, kernel = next_kernel - kernel, next_kernel
            else:
                change = self.get_delta_weight(adapter)
            x_dropped, bias = self.lora_dropout[adapter](x), self._add_bias(None, adapter)
            # Convolve in the adapter's dtype, which is more accurate if the base layer is in half precision.
            y = y + self._convolve(x_dropped, change, bias, change.dtype)
        return y.to(dtype)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Convolve `x` in `dtype`, by default the dtype of the base layer's weight."""
        conv = self.get_base_layer()
        x, geometry = pad(conv, x if dtype is None else x.to(dtype))
        dtype = dtype or conv.weight.dtype
        return convolution(x, kernel.to(dtype), None if bias is None else bias.to(dtype), geometry)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return (alpha/r) B A in the shape of the kernel, without DoRA's scale."""
        weight = self.get_base_layer().weight
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lowrank_kernel(a, b, self.scaling[adapter], weight.shape, memory_format_of(weight))

    def _compose(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return (kernel, bias) of the base layer after `adapters` are applied in the given order.

        The kernel is float32 or wider. The bias is None if neither the base layer nor an adapter has a bias.
        """
        kernel, bias = self._base_tensor("weight"), self._base_tensor("bias")
        assert kernel is not None
        kernel = base_kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        for adapter in adapters:
            delta = self.get_delta_weight(adapter)
            kernel = kernel + delta
            if self.use_dora[adapter]:
                kernel = kernel * self._dora_scale(base_kernel + delta, adapter)
            bias = self._add_bias(bias, adapter)
        return kernel, bias

    def _dora_scale(self, kernel: Tensor, adapter: str) -> Tensor:
        layer = self.lora_magnitude_vector[adapter]
        if not self._caches_dora():
            return dora_scale(kernel, layer.weight)
        norm = layer.get_weight_norm(kernel.detach(), torch.zeros_like(kernel), 0.0, adapter_name=adapter)
        return (layer.weight / norm.clamp_min(torch.finfo(norm.dtype).tiny)).transpose(0, 1)

    def _add_bias(self, bias: Tensor | None, adapter: str) -> Tensor | None:
        """Return `bias` plus the scaled bias of B. If the adapter has no `lora_bias=True`, return `bias`."""
        if not self.lora_bias[adapter]:
            return bias
        change = self.lora_B[adapter].bias * self.scaling[adapter]
        return change if bias is None else bias + change

    def _changed_tensor(self, name: Literal["weight", "bias"], adapters: list[str]) -> Tensor | None:
        if name == "bias" and not any(self.lora_bias[adapter] for adapter in adapters):
            return None
        kernel, bias = self._compose(adapters)
        if name == "weight":
            return kernel
        # With `bias="lora_only"`, PEFT sets `requires_grad` of the result. torch allows this only for leaf tensors, so
        # detach the bias.
        return None if bias is None else bias.detach()

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        kernel, bias = self._compose(adapters)
        if bias is None:
            return {"weight": kernel}
        if self.get_base_layer().bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        return {"weight": kernel, "bias": bias}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether `get_delta_weight` is the whole change of the kernel. With DoRA, the result is False.

        Before PEFT converts an adapter to plain LoRA, it calls this method on each layer, and requires True.
        """
        return not self.use_dora.get(adapter_name, False)


class LoraBatchNormLayer(BatchNormLayer, LoraLayer):
    """A `BatchNormLayer` that is also a `LoraLayer`, because `peft.LoraModel` requires this of all its layers."""

    adapter_layer_names = ("lora_norm",)

    def _get_in_out_features(self, module: BatchNorm) -> tuple[int, int]:
        return module.num_features, module.num_features

    def update_layer(  # type: ignore[override]  # PEFT passes the rank as a positional argument
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: object
    ) -> None:
        """Add an adapter, or reset an existing adapter.

        The layer does not use the rank, alpha and scaling. They are stored because PEFT's methods `set_scale` and
        `hotswap_adapter` expect them in each `LoraLayer`.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = 1.0
        super().update_layer(adapter_name, config=config)


def pad_rank(model: nn.Module, rank: int) -> bool:
    """Pad A and B of every adapter with zeros to the rank `rank`. Return whether the model has a `ConvLoraLayer`.

    A compiled model needs this padding before PEFT can replace its adapters by adapters of other ranks (hotswapping).

    Raises:
        ValueError: If an adapter has a larger rank.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvLoraLayer)]
    for layer in layers:
        for name in layer.lora_A:
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            missing = rank - lora_a.weight.shape[0]
            if missing < 0:
                raise ValueError(
                    f"Cannot pad adapter {name!r} to rank {rank}: it has rank {lora_a.weight.shape[0]}. "
                    "Pass the largest rank of all adapters as target_rank."
                )
            # F.pad starts with the last dimension. The rank is the first dimension of A, and the second of B.
            lora_a.weight.data = F.pad(lora_a.weight.data, [0, 0] * (lora_a.weight.dim() - 1) + [0, missing])
            lora_b.weight.data = F.pad(lora_b.weight.data, [0, 0] * (lora_b.weight.dim() - 2) + [0, missing])
            lora_a.out_channels = lora_b.in_channels = rank
    return bool(layers)
