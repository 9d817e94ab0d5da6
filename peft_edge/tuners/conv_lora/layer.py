"""Layers of ConvLoRA: a convolution with low-rank adapters, and the adapted BatchNorm layer."""

from __future__ import annotations

import math
import warnings

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from peft_edge._compat import BatchNorm
from peft_edge.functional.convolution import convolution, memory_format_of, pad
from peft_edge.functional.lowrank import dora_scale, lowrank_conv2d, lowrank_keeps_input, lowrank_kernel
from peft_edge.lean.inplace_norm import mark_overwritable
from peft_edge.tuners.adapted_layer import AdaptedLayer, check_plain, rows_by_adapter
from peft_edge.tuners.norm import BatchNormLayer

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DORA_VARIANTS = {1: variants.DoraConv1dVariant, 2: variants.DoraConv2dVariant, 3: variants.DoraConv3dVariant}


def check_rank(r: int, name: str) -> None:
    """Raise a `ValueError` unless the rank of layer `name` is a positive integer."""
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r} (layer {name!r})")


class ConvLoraLayer(AdaptedLayer, LoraLayer):
    """LoRA for convolutions: y = conv(x; W + (alpha/r) B A) + b. W is frozen, and A and B are trained.

    For g groups, W of shape (C_out, C_in/g, kh, kw) is read as the matrix (C_out, C_in/g * kh * kw). An adapter has

    - `lora_A[name].weight`: A, shape (r, C_in/g, kh, kw),
    - `lora_B[name].weight`: B, shape (C_out, r, 1, 1),
    - `lora_magnitude_vector[name].weight`: m, shape (1, C_out, 1, 1), only with `use_dora=True`.

    For g = 1, shapes and outputs equal those of PEFT's LoRA convolution. For a depthwise convolution (g = C_in), all
    channels share the r spatial kernels in A.

    DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) scales each output channel of W' = W + (alpha/r) B A to the trained
    length m: y = conv(x; (m / ||W'||) W') + b. The norm is a constant in the backward pass (section 4.3).

    The layer first composes the kernel and then runs one convolution; `peft_edge.functional.lowrank` has its backward.

    `base_layer` is a `Conv1d`, `Conv2d`, `Conv3d` or timm's `Conv2dSame`, or the layer of another PEFT tuner around it.
    With `use_rslora=True`, the scale is alpha / sqrt(r). `adapter_name`, `config`, `r` and `lora_alpha` belong to the
    first adapter, and error messages contain `target_name`, the name of the layer.

    Raises:
        ValueError: If the rank is not a positive integer, or the base layer has a forward pass of its own, such as a
            weight-standardised convolution.

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
        super().__init__(base_layer)
        check_plain(self.get_base_layer(), target_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """The variants of LoRA that PEFT may choose for this layer: LoRA itself, or DoRA."""
        return {(): None, ("use_dora",): _DORA_VARIANTS[len(self.get_base_layer().kernel_size)]}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs: object
    ) -> None:
        """Add an adapter, or initialise an existing adapter again; raise a `ValueError` unless `r` is positive."""
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
        # LoRA-GA applies only to linear layers. As in PEFT, convolutions then get the default initialisation.
        init = True if config.init_lora_weights == "lora_ga" else config.init_lora_weights
        if init:
            self.reset_lora_parameters(adapter_name, init)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if variant is not None:
            variant.init(self, adapter_name=adapter_name, config=config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, adapter_names: list[str] | None = None, **kwargs: object) -> Tensor:
        """Compute y = conv(x; W + (alpha/r) B A) + b for x of shape (B, C_in, *size) and the active adapters.

        `adapter_names` selects one adapter per sample, see `peft_edge.tuners.injection.pass_adapter_names`.
        """
        adapters = self._applied_adapters()
        if adapter_names is None and self._is_fused(adapters) and x.dim() == self.get_base_layer().weight.dim():
            # The common case: one adapter on a frozen convolution.
            conv, adapter = self.get_base_layer(), adapters[0]
            bias = self._add_bias(conv.bias, adapter)
            x, geometry = pad(conv, x)
            y = lowrank_conv2d(
                x,
                conv.weight,
                self.lora_A[adapter].weight,
                self.lora_B[adapter].weight,
                self.scaling[adapter],
                geometry=geometry,
                bias=None if bias is None else bias.to(conv.weight.dtype),
                magnitude=self.lora_magnitude_vector[adapter].weight if self.use_dora[adapter] else None,
                recompute=getattr(conv, "lets_recompute", False) and self.keeps_input,
            )
            return mark_overwritable(y, self)
        self._check_forward_args(x, adapter_names=adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            y = self.base_layer(x, *args, **kwargs)
            for adapter, rows in rows_by_adapter(adapter_names).items():
                if adapter in self.lora_A:
                    y[rows] = self._two_branch_forward(x[rows], [adapter])
            return y
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self._has_two_branches(adapters):
            return self._two_branch_forward(x, adapters, *args, **kwargs)
        # Several adapters, a base kernel that trains too, or a sample without batch dimension.
        return self._convolve(x, *self._compose(adapters))

    @property
    def keeps_input(self) -> bool:
        """Whether autograd saves the input for the backward pass, with the present settings."""
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
        """Whether base layer and adapters run separate convolutions: because of dropout, or of another tuner below."""
        has_dropout = self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapters)
        return has_dropout or isinstance(self.base_layer, BaseTunerLayer)

    def _is_fused(self, adapters: list[str]) -> bool:
        """Whether one adapter changes a frozen kernel, so that `lowrank_conv2d` applies."""
        is_single = len(adapters) == 1 and not self.get_base_layer().weight.requires_grad
        return is_single and not self._has_two_branches(adapters)

    def _two_branch_forward(self, x: Tensor, adapters: list[str], *args: object, **kwargs: object) -> Tensor:
        """Add to the base layer's output a convolution with each adapter's change of the kernel."""
        y = self.base_layer(x, *args, **kwargs)
        kernel, _ = self._compose([])
        for end, adapter in enumerate(adapters, start=1):
            next_kernel, _ = self._compose(adapters[:end])
            bias = self._add_bias(None, adapter)
            y = y + self._convolve(self.lora_dropout[adapter](x), next_kernel - kernel, bias)
            kernel = next_kernel
        return y

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.get_base_layer()
        dtype = conv.weight.dtype
        x, geometry = pad(conv, x)
        return convolution(x, kernel.to(dtype), None if bias is None else bias.to(dtype), geometry)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return (alpha/r) B A in the shape of the kernel, without DoRA's scale."""
        weight = self.get_base_layer().weight
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lowrank_kernel(a, b, self.scaling[adapter], weight.shape, memory_format_of(weight))

    def _compose(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return kernel and bias of the base layer with `adapters` applied in turn, in the adapters' dtype."""
        base_kernel, bias = self._base_tensor("weight"), self._base_tensor("bias")
        assert base_kernel is not None
        kernel = base_kernel
        for adapter in adapters:
            delta = self.get_delta_weight(adapter)
            kernel = kernel + delta
            if self.use_dora[adapter]:
                kernel = kernel * dora_scale(base_kernel + delta, self.lora_magnitude_vector[adapter].weight)
            bias = self._add_bias(bias, adapter)
        return kernel, bias

    def _add_bias(self, bias: Tensor | None, adapter: str) -> Tensor | None:
        """Add the scaled bias of B, which exists with `lora_bias=True`."""
        if not self.lora_bias[adapter]:
            return bias
        change = self.lora_B[adapter].bias * self.scaling[adapter]
        return change if bias is None else bias + change

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        kernel, bias = self._compose(adapters)
        if bias is None:
            return {"weight": kernel}
        if self.get_base_layer().bias is None:
            raise RuntimeError("Impossible to merge an adapter with a bias because the base layer has no bias.")
        return {"weight": kernel, "bias": bias}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `get_delta_weight` is the whole change of the kernel, as PEFT's conversion to LoRA requires."""
        return not self.use_dora.get(adapter_name, False)


class LoraBatchNormLayer(BatchNormLayer, LoraLayer):
    """A `BatchNormLayer` that is also a `LoraLayer`, because `peft.LoraModel` requires this of all its layers."""

    adapter_layer_names = ("lora_norm",)

    def _get_in_out_features(self, module: BatchNorm) -> tuple[int, int]:
        return module.num_features, module.num_features

    def update_layer(  # type: ignore[override]  # PEFT passes the rank as a positional argument
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: object
    ) -> None:
        """Add or reset an adapter. The rank and alpha are stored because hotswapping compares them."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = 1.0
        super().update_layer(adapter_name, config=config)


def pad_rank(model: nn.Module, rank: int) -> bool:
    """Pad A and B of every adapter with zeros to `rank`; return whether the model has a `ConvLoraLayer`.

    Compiled models require this padding before adapters of other ranks can be hotswapped.

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
