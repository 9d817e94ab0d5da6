"""What an adapter beside a layer must know of it: channels, and where in the input its outputs lie.

The convolution, or block of them, with bottleneck adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, create_act_layer
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from peft_edge.roles import Convolution, named_convolutions
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.kernel_adapter import KernelAdapter, check_adapter_names
from peft_edge.tuners.norm import BatchNormLayer

# An even and an odd size, large enough for the strides of a whole stage.
_PROBED_SIZES = (64, 65)


@dataclass(frozen=True)
class Geometry:
    """How a layer maps (B, in_channels, *size) to (B, out_channels, *size), as a convolution does."""

    in_channels: int
    out_channels: int

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    padding: tuple[int, ...] | None
    """Before and after each dimension, the last one first, as `F.pad` takes it; None: timm's same-padding."""

    padding_mode: str = "constant"
    """One of `F.pad`."""

    @classmethod
    def of_convolution(cls, conv: Convolution) -> Geometry:
        """The geometry of a plain convolution."""
        is_same = isinstance(conv, Conv2dSame)
        return cls(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            padding=None if is_same else tuple(conv._reversed_padding_repeated_twice),
            padding_mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode,
        )

    @classmethod
    def of_block(cls, block: nn.Module, name: str) -> Geometry:
        """The geometry of a block of convolutions, of kernel size 3.

        Nothing in a block tells its stride, so a copy without memory maps an even and an odd size.

        Args:
            block: the block; its first convolution takes its input.
            name: its name in the model.

        Raises:
            ValueError: if it does not map (B, C, *size) to (B, C', *size / stride), naming it.
        """
        conv = next((conv for _, conv, _ in named_convolutions(block)), None)
        if conv is None:
            raise ValueError(
                f"Cannot adapt layer {name!r}: {type(block).__name__} is no convolution and holds none. Leave it out "
                f"with exclude_modules=[{name!r}]."
            )
        dims = len(conv.kernel_size)
        probe = copy.deepcopy(block).to("meta").eval()
        try:
            with torch.no_grad():
                shapes = [
                    probe(
                        torch.empty(1, conv.in_channels, *[size] * dims, device="meta", dtype=conv.weight.dtype)
                    ).shape
                    for size in _PROBED_SIZES
                ]
            stride = tuple(math.ceil(_PROBED_SIZES[0] / size) for size in shapes[0][2:])
            expected = [(1, shapes[0][1], *(math.ceil(size / step) for step in stride)) for size in _PROBED_SIZES]
            if len(stride) != dims or expected != [tuple(shape) for shape in shapes]:
                raise ValueError(f"it maps {_PROBED_SIZES} pixels to {[tuple(shape) for shape in shapes]}")
        except Exception as error:
            raise ValueError(
                f"Cannot adapt layer {name!r}: expected a block that maps (B, {conv.in_channels}, *size) to maps of "
                f"size / stride, rounded up, found {type(block).__name__} ({error}). Adapt the convolutions in it, or "
                f"leave it out with exclude_modules=[{name!r}]."
            ) from error
        return cls(conv.in_channels, shapes[0][1], (3,) * dims, stride, (1,) * dims, (1,) * (2 * dims))

    def of_output(self) -> Geometry:
        """The geometry of what maps the layer's output to its own shape."""
        ones = (1,) * len(self.kernel_size)
        padding = tuple(side for size in reversed(self.kernel_size) for side in ((size - 1) // 2, size // 2))
        return Geometry(self.out_channels, self.out_channels, self.kernel_size, ones, ones, padding)

    def margins(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """How far the layer's kernel reaches beyond a centred one of `kernel_size`, in taps, ordered as `padding`."""
        margins: list[int] = []
        for own, other in zip(reversed(self.kernel_size), reversed(kernel_size), strict=True):
            before = (own - other) // 2
            margins += before, own - other - before
        return tuple(margins)

    def pad(self, x: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
        """Pads, or crops, `x` so that a kernel of another size, centred on the layer's own, needs no padding.

        Args:
            x: (B, C, *size) of the layer's input size.
            kernel_size: the other size, with the layer's stride and dilation.
        """
        sides = self._same_padding(x) if self.padding is None else self.padding
        dilation = [step for step in reversed(self.dilation) for _ in range(2)]
        sides = tuple(
            side - step * margin for side, step, margin in zip(sides, dilation, self.margins(kernel_size), strict=True)
        )
        if min(sides) < 0:
            x = F.pad(x, [min(side, 0) for side in sides])
        if max(sides) > 0:
            x = F.pad(x, [max(side, 0) for side in sides], mode=self.padding_mode)
        return x

    def _same_padding(self, x: Tensor) -> tuple[int, ...]:
        sides: list[int] = []
        for dim in reversed(range(len(self.kernel_size))):
            total = get_same_padding(x.shape[dim + 2], self.kernel_size[dim], self.stride[dim], self.dilation[dim])
            sides += total // 2, total - total // 2
        return tuple(sides)


class AdapterBatchNormLayer(BatchNormLayer):
    """A `BatchNormLayer` of ConvAdapter."""

    adapter_layer_names = ("conv_adapter_norm",)


class ConvAdapterLayer(nn.Module, KernelAdapter):
    """A layer plus the bottlenecks of the active adapters, each of which maps the layer's input or its output.

    With C channels in, width w and kernel size k, `conv_adapter_down` is (w, C, 1, ...), `conv_adapter_depthwise`
    (w, 1, k, ...) and `conv_adapter_up` (C_out, w, 1, ...), all without bias.

    Args:
        base_layer: a plain convolution, or a block of convolutions.
        adapter_name: the first adapter's name.
        config: its configuration.
        target_name: the layer's name in the model, for error messages.

    Raises:
        ValueError: if a block does not map channels to channels.
    """

    adapter_layer_names = (
        "conv_adapter_down",
        "conv_adapter_depthwise",
        "conv_adapter_activation",
        "conv_adapter_up",
    )
    other_param_names = ("placement",)

    if TYPE_CHECKING:
        # torch declares every attribute set elsewhere a tensor or a module; PEFT's are dictionaries and methods.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ConvAdapterConfig, target_name: str = ""
    ) -> None:
        super().__init__()
        self.geometry = (
            Geometry.of_convolution(base_layer)
            if isinstance(base_layer, Convolution)
            else Geometry.of_block(base_layer, target_name)
        )
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.placement: dict[str, str] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ConvAdapterConfig) -> None:
        """Adds an adapter, or starts it anew."""
        self.placement[adapter_name] = config.placement
        geometry = self._geometry_of(adapter_name)
        dims = len(geometry.kernel_size)
        kernel_size = geometry.kernel_size if config.kernel_size is None else (config.kernel_size,) * dims
        width = max(1, geometry.in_channels // config.reduction)
        conv_cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        is_spatial = max(kernel_size) > 1
        # Without a depthwise convolution, the first pointwise one takes the stride.
        self.conv_adapter_down[adapter_name] = conv_cls(
            geometry.in_channels, width, 1, stride=1 if is_spatial else geometry.stride, bias=False
        )
        self.conv_adapter_depthwise[adapter_name] = (
            conv_cls(width, width, kernel_size, geometry.stride, 0, geometry.dilation, groups=width, bias=False)
            if is_spatial
            else nn.Identity()
        )
        self.conv_adapter_activation[adapter_name] = (
            create_act_layer(config.activation) if config.activation else nn.Identity()
        )
        self.conv_adapter_up[adapter_name] = conv_cls(width, geometry.out_channels, 1, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.conv_adapter_up[adapter_name].weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _geometry_of(self, adapter: str) -> Geometry:
        return self.geometry if self.placement[adapter] == "parallel" else self.geometry.of_output()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # A block has no weight of its own.
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def _own_adapters(self) -> Iterable[str]:
        return self.conv_adapter_up

    def _change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """What an adapter adds to the layer's output `y` for its input `x`, at the adapter's precision."""
        down, depthwise, activation, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        geometry = self._geometry_of(adapter)
        z = self._cast_input_dtype(x if self.placement[adapter] == "parallel" else y, down.weight.dtype)
        if isinstance(depthwise, nn.Identity):
            z = down(geometry.pad(z, down.kernel_size))
        else:
            # No bias comes before, so the padding is the same after `down` as before it, on fewer channels.
            z = depthwise(geometry.pad(down(z), depthwise.kernel_size))
        return up(activation(z))

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Maps (B, C_in, *size) as the base layer does.

        Args:
            x: the input.
            *args: for the base layer.
            adapter_names: one adapter for each sample, `"__base__"` for none (evaluation only).
            **kwargs: for the base layer.
        """
        check_adapter_names(self, x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if adapter_names is not None:
            return self._adapt_mixed_batch(x, y, adapter_names)
        changes = [self._change(name, x, y) for name in self.active_adapters if name in self.conv_adapter_up]
        return sum((change.to(y.dtype) for change in changes), start=y)

    def _adapt_mixed_batch(self, x: Tensor, y: Tensor, adapter_names: list[str]) -> Tensor:
        result = y.clone()
        for adapter in sorted(set(adapter_names) & set(self.conv_adapter_up)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] += self._change(adapter, x[rows], y[rows]).to(y.dtype)
        return result

    def why_not_mergeable(self, adapter: str) -> str | None:
        """Why an adapter cannot become a part of the base layer's kernel; None: it can."""
        base = self.base_layer
        if not isinstance(base, Convolution):
            return f"{type(base).__name__} is a block, not a convolution"
        if self.placement[adapter] != "parallel":
            return "it is in sequence with the convolution, not in parallel"
        activation = self.conv_adapter_activation[adapter]
        if not isinstance(activation, nn.Identity):
            return f"it is not linear, its activation is {type(activation).__name__}"
        if base.groups != 1:
            return f"it mixes all channels, and the convolution has {base.groups} groups"
        if min(self.geometry.margins(self._kernel_size(adapter))) < 0:
            return f"its kernel, {self._kernel_size(adapter)}, is larger than the convolution's, {base.kernel_size}"
        return None

    def _kernel_size(self, adapter: str) -> tuple[int, ...]:
        depthwise = self.conv_adapter_depthwise[adapter]
        return (1,) * len(self.geometry.kernel_size) if isinstance(depthwise, nn.Identity) else depthwise.kernel_size

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the kernel, (C_out, C_in, *kernel), that a mergeable adapter stands for."""
        down, depthwise, _, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        kernel = down.weight
        if not isinstance(depthwise, nn.Identity):
            kernel = kernel * depthwise.weight
        kernel = torch.tensordot(up.weight.flatten(1), kernel, dims=1)
        return F.pad(kernel, self.geometry.margins(self._kernel_size(adapter)))

    def _compose(self, adapters: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        kernel, bias = self._base_parameters()
        return sum((self.get_delta_weight(name) for name in adapters), start=kernel), bias

    def __repr__(self) -> str:
        return "conv_adapter." + super().__repr__()
