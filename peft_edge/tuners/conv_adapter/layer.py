"""Layers of ConvAdapter: a convolution or a block with bottleneck adapters, and the adapted BatchNorm layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import Conv2dSame, create_act_layer
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.func import functional_call

from peft_edge._compat import f_pad_sides
from peft_edge.roles import is_convolution, meta_copy, named_convolutions
from peft_edge.tuners.adapted_layer import (
    AdaptedLayer,
    call_with_forward,
    is_observed,
    loaded,
    replaces_forward,
    rows_by_adapter,
)
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.norm import BatchNormLayer

if TYPE_CHECKING:
    from peft_edge.roles import Convolution

_CONVOLUTIONS: dict[int, Callable[..., Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# Image sizes for measuring the stride of a block. Use an even and an odd size, because the rounding of the output size
# must be right for both.
_PROBED_SIZES = (64, 65)


@dataclass(frozen=True)
class ConvSpec:
    """The options of a convolution whose input and output have the same shapes as those of an adapted layer.

    `padding` and `padding_mode` have the format of the arguments of `F.pad`. If `padding` is None, the convolution uses
    timm's same-padding, which depends on the size of the input.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | None
    padding_mode: str = "constant"

    @classmethod
    def of_convolution(cls, conv: Convolution) -> ConvSpec:
        """Return a `ConvSpec` with the options of `conv`."""
        padding = None if isinstance(conv, Conv2dSame) else f_pad_sides(conv)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        channels = conv.in_channels, conv.out_channels
        return cls(*channels, conv.kernel_size, conv.stride, conv.dilation, padding, mode)

    @classmethod
    def of_block(cls, block: nn.Module, name: str) -> ConvSpec:
        """Return the options of a convolution with kernel size 3 and with the channels and the stride of `block`.

        The number of input channels, C_in, is that of the first convolution in the block. The number of output
        channels, C_out, and the stride are measured by running the block on inputs of two sizes on the meta device.
        Error messages refer to the block as `name`.

        Raises:
            ValueError: If the block contains no convolution, or does not map (B, C_in, *size) to
                (B, C_out, *ceil(size / stride)).
        """
        conv = next((conv for _, conv, _ in named_convolutions(block)), None)
        if conv is None:
            raise ValueError(
                f"Cannot adapt layer {name!r}: {type(block).__name__} is no convolution and holds none. Leave out "
                f"this layer with exclude_modules=[{name!r}]."
            )
        dims = len(conv.kernel_size)
        probe = meta_copy(block).eval()
        inputs = [
            torch.empty(1, conv.in_channels, *[size] * dims, device="meta", dtype=conv.weight.dtype)
            for size in _PROBED_SIZES
        ]
        try:
            with torch.no_grad():
                shapes = [tuple(probe(x).shape) for x in inputs]
            stride = tuple(math.ceil(_PROBED_SIZES[0] / size) for size in shapes[0][2:])
            expected = [(1, shapes[0][1], *(math.ceil(size / step) for step in stride)) for size in _PROBED_SIZES]
            if len(stride) != dims or expected != shapes:
                raise ValueError(f"it maps {_PROBED_SIZES} pixels to {shapes}")
        except Exception as error:
            raise ValueError(
                f"Cannot adapt layer {name!r}: expected a block that maps (B, {conv.in_channels}, *size) to "
                f"(B, C, *ceil(size / stride)), found {type(block).__name__} ({error}). Adapt the convolutions inside "
                f"the block, or leave out the block with exclude_modules=[{name!r}]."
            ) from error
        return cls(conv.in_channels, shapes[0][1], (3,) * dims, stride, (1,) * dims, (1,) * (2 * dims))

    def of_output(self) -> ConvSpec:
        """Return the options of a convolution that maps the output of the adapted layer to a tensor of the same shape.

        The kernel size is `self.kernel_size`.
        """
        ones = (1,) * len(self.kernel_size)
        padding = tuple(side for size in reversed(self.kernel_size) for side in ((size - 1) // 2, size // 2))
        return ConvSpec(self.out_channels, self.out_channels, self.kernel_size, ones, ones, padding)

    def margins(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the padding (for `F.pad`) that enlarges a kernel of size `kernel_size` to `self.kernel_size`."""
        margins: list[int] = []
        for own, other in zip(reversed(self.kernel_size), reversed(kernel_size), strict=True):
            before = (own - other) // 2
            margins += before, own - other - before
        return tuple(margins)

    def pad(self, x: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
        """Pad or crop `x`, (B, C, *size), for a convolution without padding and with a kernel of size `kernel_size`.

        This convolution then has the same output size as a convolution of the original `x` with the options `self`. For
        each output pixel, the kernels of the two convolutions have their centres at the same pixel of `x`.
        """
        sides = self.padding or self._same_padding(x)
        dilation = [step for step in reversed(self.dilation) for _ in range(2)]
        sides = tuple(
            side - step * margin for side, step, margin in zip(sides, dilation, self.margins(kernel_size), strict=True)
        )
        if max(sides) > 0:
            x = F.pad(x, [max(side, 0) for side in sides], mode=self.padding_mode)
        if min(sides) < 0:
            # Crop after padding. Circular padding copies values from the opposite side, which a crop might remove.
            x = F.pad(x, [min(side, 0) for side in sides])
        return x

    def _same_padding(self, x: Tensor) -> tuple[int, ...]:
        sides: list[int] = []
        for dim in reversed(range(len(self.kernel_size))):
            total = get_same_padding(x.shape[dim + 2], self.kernel_size[dim], self.stride[dim], self.dilation[dim])
            sides += total // 2, total - total // 2
        return tuple(sides)


class ConvAdapterLayer(AdaptedLayer):
    """A convolution or block with bottleneck adapters: y = base_layer(x) + up(activation(depthwise(down(x)))).

    With `placement="sequential"`, the input of the adapter is `base_layer(x)` instead of x. An adapter has no biases.
    Let C_in be the number of input channels of the adapter, w = max(1, C_in // reduction) and k = kernel_size. Then the
    weights are:

    - `conv_adapter_down[name].weight`: (w, C_in, 1, 1),
    - `conv_adapter_depthwise[name].weight`: (w, 1, k, k), absent if k = 1,
    - `conv_adapter_up[name].weight`: (C_out, w, 1, 1), initialised to zero.

    A parallel adapter has the stride, dilation and padding of the base layer. `adapter_name` and `config` are those of
    the first adapter; `update_layer` adds further adapters. Error messages contain `target_name`, the name of the
    layer.

    Raises:
        ValueError: If `base_layer` is a block that contains no convolution, or a block that does not map (B, C_in,
            *size) to (B, C_out, *ceil(size / stride)).

    Example:
        >>> from peft_edge import ConvAdapterConfig, ConvAdapterLayer
        >>> layer = ConvAdapterLayer(torch.nn.Conv2d(8, 16, 3, stride=2), "default", ConvAdapterConfig(reduction=2))
        >>> layer.conv_adapter_down["default"].weight.shape, layer.conv_adapter_depthwise["default"].weight.shape
        (torch.Size([4, 8, 1, 1]), torch.Size([4, 1, 3, 3]))
        >>> layer(torch.randn(1, 8, 9, 9)).shape
        torch.Size([1, 16, 4, 4])
    """

    adapter_layer_names = tuple(f"conv_adapter_{part}" for part in ("down", "depthwise", "activation", "up"))
    other_param_names = ("placement",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ConvAdapterConfig, target_name: str = ""
    ) -> None:
        super().__init__(base_layer, target_name)
        self.spec = (
            ConvSpec.of_convolution(base_layer)
            if is_convolution(base_layer)
            else ConvSpec.of_block(base_layer, target_name)
        )
        self.placement: dict[str, str] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ConvAdapterConfig) -> None:
        """Add an adapter, or initialise an existing adapter again."""
        self.placement[adapter_name] = config.placement
        spec = self._adapter_spec(adapter_name)
        dims = len(spec.kernel_size)
        kernel_size = spec.kernel_size if config.kernel_size is None else (config.kernel_size,) * dims
        width = max(1, spec.in_channels // config.reduction)
        conv_cls = _CONVOLUTIONS[dims]
        depthwise: nn.Module = nn.Identity()
        down_stride = spec.stride
        if max(kernel_size) > 1:
            depthwise = conv_cls(width, width, kernel_size, spec.stride, 0, spec.dilation, groups=width, bias=False)
            down_stride = (1,) * dims
        activation = create_act_layer(config.activation) if config.activation else nn.Identity()
        self.conv_adapter_down[adapter_name] = conv_cls(spec.in_channels, width, 1, down_stride, bias=False)
        self.conv_adapter_depthwise[adapter_name] = depthwise
        self.conv_adapter_activation[adapter_name] = activation
        self.conv_adapter_up[adapter_name] = conv_cls(width, spec.out_channels, 1, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.conv_adapter_up[adapter_name].weight)
        with loaded(*self.base_layer.modules()):
            BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapter_spec(self, adapter: str) -> ConvSpec:
        return self.spec if self.placement[adapter] == "parallel" else self.spec.of_output()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def forward(self, x: Tensor, *args: object, adapter_names: list[str] | None = None, **kwargs: object) -> Tensor:
        """Compute `base_layer(x)` for x of shape (B, C_in, *size), and add the output of each active adapter.

        `adapter_names` selects one adapter per sample, see `peft_edge.tuners.injection.pass_adapter_names`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters, base = self._applied_adapters(), self.base_layer
        names = None if self.disable_adapters else adapter_names
        if names is None and not adapters:
            return base(x, *args, **kwargs)
        if is_observed(base) and is_convolution(base):
            # Hooks of the convolution must receive the adapted output, as they do after merging. Call the convolution
            # with a forward pass that includes the adapters.
            if hasattr(base, "_hf_hook") or not replaces_forward(base):
                forward = partial(self._add_adapters, adapters=adapters, adapter_names=names)
                plain_forward = partial(type(base).forward, base)  # type: ignore[arg-type]  # matches the class of base
                return call_with_forward(base, lambda x: forward(x, plain_forward(x)), x)
            if names is None and not any(self.why_not_mergeable(name) for name in adapters):
                return functional_call(base, self._merged_tensors(adapters), (x,))
        return self._add_adapters(x, base(x, *args, **kwargs), adapters, names)

    def _add_adapters(self, x: Tensor, y: Tensor, adapters: list[str], adapter_names: list[str] | None) -> Tensor:
        """Return `y` plus the outputs of the adapters. `x` is the base layer's input, and `y` its output.

        If `adapter_names` is given, sample i uses only the adapter `adapter_names[i]`.
        """
        if adapter_names is None:
            return sum((self._adapter_output(name, x, y).to(y.dtype) for name in adapters), start=y)
        result = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names).items():
            if adapter in self.conv_adapter_up:
                result[rows] += self._adapter_output(adapter, x[rows], y[rows]).to(y.dtype)
        return result

    def _adapter_output(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output of an adapter in the adapter's dtype. `x` is the base layer's input, and `y` its output."""
        down, depthwise, activation, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        spec = self._adapter_spec(adapter)
        z = self._cast_input_dtype(x if self.placement[adapter] == "parallel" else y, down.weight.dtype)
        if isinstance(depthwise, nn.Identity):
            z = down(spec.pad(z, down.kernel_size))
        else:
            # Pad the output of `down`, which has fewer channels than the input. Padding the input would give the same
            # result, because `down` has no bias and maps padded zeros to zeros.
            z = depthwise(spec.pad(down(z), depthwise.kernel_size))
        return up(activation(z))

    def why_not_mergeable(self, adapter: str) -> str | None:
        """Return the reason why an adapter cannot be merged into the base layer, or None if it can be merged."""
        base = self.base_layer
        if not is_convolution(base):
            return f"{type(base).__name__} is a block, not a convolution"
        if self.placement[adapter] != "parallel":
            return "it is in sequence with the convolution, not in parallel"
        activation = self.conv_adapter_activation[adapter]
        if not isinstance(activation, nn.Identity):
            return f"it is not linear, its activation is {type(activation).__name__}"
        if base.groups != 1:
            return f"it mixes all channels, and the convolution has {base.groups} groups"
        if min(self.spec.margins(self._kernel_size(adapter))) < 0:
            return f"its kernel, {self._kernel_size(adapter)}, is larger than the convolution's, {base.kernel_size}"
        return None

    def _kernel_size(self, adapter: str) -> tuple[int, ...]:
        depthwise = self.conv_adapter_depthwise[adapter]
        return (1,) * len(self.spec.kernel_size) if isinstance(depthwise, nn.Identity) else depthwise.kernel_size

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the kernel update, (C_out, C_in, *size), that has the effect of the adapter.

        `why_not_mergeable` must return None for this adapter.
        """
        down, depthwise, _, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        kernel = down.weight if isinstance(depthwise, nn.Identity) else down.weight * depthwise.weight
        kernel = torch.tensordot(up.weight.flatten(1), kernel, dims=1)
        return F.pad(kernel, self.spec.margins(self._kernel_size(adapter)))

    def _changed_tensor(self, name: Literal["weight", "bias"], adapters: list[str]) -> Tensor | None:
        if name == "bias":
            return None
        for adapter in adapters:
            if (reason := self.why_not_mergeable(adapter)) is not None:
                raise AttributeError(
                    f"layer {self.target_name!r} has no 'weight' with its adapter {adapter!r}: {reason}. Read the "
                    "weight of the base layer from get_base_layer()."
                )
        return self._merged_tensors(adapters)["weight"]

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        kernel = self._base_tensor("weight")
        assert kernel is not None
        return {"weight": sum((self.get_delta_weight(name) for name in adapters), start=kernel)}


class AdapterBatchNormLayer(BatchNormLayer):
    """The subclass of `BatchNormLayer` for ConvAdapter."""

    adapter_layer_names = ("conv_adapter_norm",)
