"""The BatchNorm layer of a ConvLoRA adapter.

The convolution with low-rank adapters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from peft_edge.functional.convolution import convolution, dora_scale, lowrank_kernel, memory_format, pad
from peft_edge.functional.lowrank import keeps_input, lowrank_conv2d
from peft_edge.lean.inplace_norm import mark_overwritable
from peft_edge.tuners.kernel_adapter import KernelAdapter, check_convolution
from peft_edge.tuners.norm import BatchNormLayer


class LoraBatchNormLayer(BatchNormLayer, LoraLayer):
    """A `BatchNormLayer` that PEFT takes for one of LoRA's layers, as it does all that `LoraModel` handles."""

    adapter_layer_names = ("lora_norm",)

    def _wrap(self, base_layer: nn.Module) -> None:
        LoraLayer.__init__(self, base_layer)

    def _get_in_out_features(self, module: nn.modules.batchnorm._BatchNorm) -> tuple[int, int]:
        return module.num_features, module.num_features

    def update_layer(  # type: ignore[override]  # PEFT gives the rank by its position
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter that starts from the base layer, or starts it anew; hotswapping asks for its numbers."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = 1.0
        super().update_layer(adapter_name, config=config)

    def __repr__(self) -> str:
        return "conv_lora." + super().__repr__()


_DORA_VARIANTS = {1: variants.DoraConv1dVariant, 2: variants.DoraConv2dVariant, 3: variants.DoraConv3dVariant}


def check_rank(r: int, name: str) -> None:
    """Checks that a rank is a positive integer.

    Args:
        r: the rank.
        name: the layer's name in the model.

    Raises:
        ValueError: if it is not, naming the layer.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {r} (layer {name!r})")


class ConvLoraLayer(nn.Module, KernelAdapter, LoraLayer):
    """A convolution whose kernel is its base layer's plus the low-rank updates of the active adapters.

    The kernels are added first and one convolution runs. For one group the parameters have the shapes and names of
    PEFT's own LoRA convolution: `lora_A` is (r, C_in/g, *kernel), `lora_B` is (C_out, r, 1, ...), the DoRA magnitude
    (1, C_out, 1, ...).

    Args:
        base_layer: a `Conv1d`, `Conv2d`, `Conv3d` or timm `Conv2dSame`, possibly wrapped by another PEFT tuner.
        adapter_name: the first adapter's name.
        config: its configuration.
        r: its rank, any positive number.
        lora_alpha: the update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        target_name: the layer's name in the model, for error messages.

    Raises:
        ValueError: if the rank is not positive, or the base layer is not a plain convolution of its weight (a
            weight-standardised one is not).
    """

    if TYPE_CHECKING:
        # torch declares every attribute set elsewhere a tensor or a module; PEFT's are dictionaries and methods.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        check_convolution(self.get_base_layer(), target_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """The LoRA variants that apply to convolutions, for PEFT to choose from."""
        return {(): None, ("use_dora",): _DORA_VARIANTS[len(self.get_base_layer().kernel_size)]}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs: Any
    ) -> None:
        """Adds an adapter, or starts it anew.

        Raises:
            ValueError: if `r` is not a positive integer.
        """
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
        conv_cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(conv.kernel_size) - 1]
        self.lora_A[adapter_name] = conv_cls(conv.in_channels // conv.groups, r, conv.kernel_size, bias=False)
        self.lora_B[adapter_name] = conv_cls(r, conv.out_channels, 1, bias=config.lora_bias)
        # The initialisations that start from the base weight are defined for linear layers; as in PEFT, a convolution
        # in the same adapter takes the usual start where that leaves the model's output as it is.
        init = True if config.init_lora_weights == "lora_ga" else config.init_lora_weights
        if init:
            self.reset_lora_parameters(adapter_name, init)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if variant is not None:
            variant.init(self, adapter_name=adapter_name, config=config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's scaled kernel update, (C_out, C_in/g, *kernel), without DoRA's factor."""
        weight = self.get_base_layer().weight
        return lowrank_kernel(
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            weight.shape,
            memory_format(weight),
        )

    def _own_adapters(self) -> Iterable[str]:
        return self.lora_A

    def _compose(self, adapters: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        base_kernel, bias = self._base_parameters()
        kernel = base_kernel
        for adapter in adapters:
            delta = self.get_delta_weight(adapter)
            kernel = kernel + delta
            if self.use_dora[adapter]:
                magnitude = self.lora_magnitude_vector[adapter].weight
                kernel = kernel * dora_scale(base_kernel + delta, magnitude)
            bias = self._add_bias(bias, adapter)
        return kernel, bias

    def _add_bias(self, bias: Tensor | None, adapter: str) -> Tensor | None:
        if not self.lora_bias[adapter]:
            return bias
        update = self.lora_B[adapter].bias * self.scaling[adapter]
        return update if bias is None else bias + update

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.get_base_layer()
        dtype = conv.weight.dtype
        x, geometry = pad(conv, x)
        return convolution(x, kernel.to(dtype), None if bias is None else bias.to(dtype), geometry)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Maps (B, C_in, *size) as the base layer does.

        Args:
            x: the input.
            *args: for the base layer.
            adapter_names: one adapter for each sample, `"__base__"` for none (evaluation only).
            **kwargs: for the base layer.
        """
        self._check_forward_args(x, adapter_names=adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        adapters = self._applied_adapters()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self._has_two_branches(adapters):
            return self._two_branch_forward(x, adapters, *args, **kwargs)
        if self._is_plain(adapters) and x.dim() == self.get_base_layer().weight.dim():
            return self._lowrank_forward(x, adapters[0])
        return self._convolve(x, *self._compose(adapters))

    @property
    def keeps_input(self) -> bool:
        """Whether the layer's backward keeps its input, as the layer is set now."""
        adapters = self._applied_adapters()
        if not adapters:
            return getattr(self.base_layer, "keeps_input", True)
        if self._has_two_branches(adapters) or not self._is_plain(adapters):
            return True
        (adapter,) = adapters
        return keeps_input(
            self.get_base_layer().groups,
            trains_a=self.lora_A[adapter].weight.requires_grad,
            trains_b=self.lora_B[adapter].weight.requires_grad,
            trains_magnitude=self.use_dora[adapter] and self.lora_magnitude_vector[adapter].weight.requires_grad,
        )

    def _applied_adapters(self) -> list[str]:
        """The adapters that the forward applies to the base layer's kernel."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def _has_two_branches(self, adapters: list[str]) -> bool:
        has_dropout = self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapters)
        return has_dropout or isinstance(self.base_layer, BaseTunerLayer)

    def _is_plain(self, adapters: list[str]) -> bool:
        """Whether the adapters are one, on a frozen kernel."""
        return len(adapters) == 1 and not self.get_base_layer().weight.requires_grad

    def _lowrank_forward(self, x: Tensor, adapter: str) -> Tensor:
        conv = self.get_base_layer()
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

    def _two_branch_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus a convolution for each adapter's own change of the kernel.

        For inputs that differ between the branches, and for a base layer that is itself another tuner's.
        """
        result = self.base_layer(x, *args, **kwargs)
        kernel, _ = self._compose([])
        for end, adapter in enumerate(adapters, start=1):
            next_kernel, _ = self._compose(adapters[:end])
            bias = self.lora_B[adapter].bias
            bias = None if bias is None else bias * self.scaling[adapter]
            result = result + self._convolve(self.lora_dropout[adapter](x), next_kernel - kernel, bias)
            kernel = next_kernel
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result = self.base_layer(x)
        for adapter in sorted(set(adapter_names) & set(self.lora_A)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] = self._two_branch_forward(x[rows], [adapter])
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can read the adapter's change off `get_delta_weight`."""
        return not self.use_dora.get(adapter_name, False)

    def __repr__(self) -> str:
        return "conv_lora." + super().__repr__()


def pad_rank(model: nn.Module, rank: int) -> bool:
    """Pads the adapters of every `ConvLoraLayer` with zeros to `rank`, and says whether there was one.

    Raises:
        ValueError: if an adapter has a larger rank.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvLoraLayer)]
    for layer in layers:
        for name in layer.lora_A:
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            missing = rank - lora_a.weight.shape[0]
            if missing < 0:
                raise ValueError(
                    f"Cannot pad adapter {name!r} to rank {rank}: it has rank {lora_a.weight.shape[0]}. "
                    "Pass the largest rank of all the adapters as target_rank."
                )
            lora_a.weight.data = torch.cat([lora_a.weight, lora_a.weight.new_zeros(missing, *lora_a.weight.shape[1:])])
            zeros = lora_b.weight.new_zeros(len(lora_b.weight), missing, *lora_b.weight.shape[2:])
            lora_b.weight.data = torch.cat([lora_b.weight, zeros], dim=1)
            lora_a.out_channels = lora_b.in_channels = rank
    return bool(layers)
