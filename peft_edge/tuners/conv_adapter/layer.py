"""The layers of ConvAdapter: a convolution or a block with bottleneck adapters, and its BatchNorm counterpart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, create_act_layer
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from peft_edge._compat import f_pad_sides
from peft_edge.roles import is_convolution, named_convolutions
from peft_edge.tuners.adapted_layer import AdaptedLayer, rows_by_adapter
from peft_edge.tuners.conv_adapter.config import ConvAdapterConfig
from peft_edge.tuners.norm import BatchNormLayer

if TYPE_CHECKING:
    from peft_edge.roles import Convolution

_CONVOLUTIONS: dict[int, Callable[..., Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# An even and an odd size, large enough for the strides of a whole stage.
_PROBED_SIZES = (64, 65)


@dataclass(frozen=True)
class ConvSpec:
    """The convolution whose input and output shapes a layer has: (B, in_channels, *size) to (B, out_channels, *size').

    An adapter needs it to compute, from the same input, an output of the same shape.
    """

    in_channels: int
    out_channels: int

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    padding: tuple[int, ...] | None
    """As `F.pad` takes it: before and after each dimension, the last dimension first. None: timm's same-padding."""

    padding_mode: str = "constant"
    """A mode of `F.pad`."""

    @classmethod
    def of_convolution(cls, conv: Convolution) -> ConvSpec:
        """Return the specification of a plain convolution."""
        padding = None if isinstance(conv, Conv2dSame) else f_pad_sides(conv)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        channels = conv.in_channels, conv.out_channels
        return cls(*channels, conv.kernel_size, conv.stride, conv.dilation, padding, mode)

    @classmethod
    def of_block(cls, block: nn.Module, name: str) -> ConvSpec:
        """Return a 3x3 convolution with the channels and the stride of a block of convolutions.

        The stride is measured: a copy of the block on the meta device maps an input of even and one of odd size. The
        first convolution of the block must take the block's input.

        Raises:
            ValueError: If the block `name` does not map (B, C, *size) to (B, C', *ceil(size / stride)).
        """
        conv = next((conv for _, conv, _ in named_convolutions(block)), None)
        if conv is None:
            raise ValueError(
                f"Cannot adapt layer {name!r}: {type(block).__name__} is no convolution and holds none. Leave it out "
                f"with exclude_modules=[{name!r}]."
            )
        dims = len(conv.kernel_size)
        probe = copy.deepcopy(block).to("meta").eval()
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
                f"Cannot adapt layer {name!r}: expected a block that maps (B, {conv.in_channels}, *size) to maps of "
                f"size / stride, rounded up, found {type(block).__name__} ({error}). Adapt the convolutions in it, or "
                f"leave it out with exclude_modules=[{name!r}]."
            ) from error
        return cls(conv.in_channels, shapes[0][1], (3,) * dims, stride, (1,) * dims, (1,) * (2 * dims))

    def of_output(self) -> ConvSpec:
        """Return a convolution of the same kernel size that maps the layer's output to its own shape."""
        ones = (1,) * len(self.kernel_size)
        padding = tuple(side for size in reversed(self.kernel_size) for side in ((size - 1) // 2, size // 2))
        return ConvSpec(self.out_channels, self.out_channels, self.kernel_size, ones, ones, padding)

    def margins(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the zeros that pad a smaller kernel to this one's size, ordered as `padding`; negative if larger."""
        margins: list[int] = []
        for own, other in zip(reversed(self.kernel_size), reversed(kernel_size), strict=True):
            before = (own - other) // 2
            margins += before, own - other - before
        return tuple(margins)

    def pad(self, x: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
        """Pad or crop `x`, (B, C, *size), for an unpadded convolution of another kernel size.

        The output has the same size as this convolution's, and the two kernels have the same centre.
        """
        sides = self.padding or self._same_padding(x)
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


class ConvAdapterLayer(AdaptedLayer):
    """A convolution or a block f with bottleneck adapters: y = f(x) + up(act(depthwise(down(x)))).

    An adapter with `placement="sequential"` takes f(x) in the place of x. For C_in input channels, width w =
    max(1, C_in // reduction) and kernel size k, the weights are, all without bias,

    - `conv_adapter_down[name].weight`: (w, C_in, 1, 1),
    - `conv_adapter_depthwise[name].weight`: (w, 1, k, k), with the stride of f; none for k = 1,
    - `conv_adapter_up[name].weight`: (C_out, w, 1, 1), initialised to zero.

    Args:
        base_layer: Plain convolution, or block of convolutions.
        adapter_name: Name of the first adapter.
        config: Configuration of the first adapter.
        target_name: Name of the layer in the model, for error messages.

    Raises:
        ValueError: If a block does not act like a strided convolution, see `ConvSpec.of_block`.

    Example:
        >>> import torch
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
        super().__init__(base_layer)
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
        """Add an adapter, or initialise it again."""
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
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapter_spec(self, adapter: str) -> ConvSpec:
        return self.spec if self.placement[adapter] == "parallel" else self.spec.of_output()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def forward(self, x: Tensor, *args: object, adapter_names: list[str] | None = None, **kwargs: object) -> Tensor:
        """Compute f(x) for x of shape (B, C_in, *size), and add the output of each active adapter.

        `adapter_names` names the adapter for each sample, see `peft_edge.tuners.injection.pass_adapter_names`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if adapter_names is None or self.disable_adapters:
            changes = [self._adapter_output(name, x, y).to(y.dtype) for name in self._applied_adapters()]
            return sum(changes, start=y)
        result = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names).items():
            if adapter in self.conv_adapter_up:
                result[rows] += self._adapter_output(adapter, x[rows], y[rows]).to(y.dtype)
        return result

    def _adapter_output(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what an adapter adds to the base layer's output `y` for the input `x`, in the adapter's dtype."""
        down, depthwise, activation, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        spec = self._adapter_spec(adapter)
        z = self._cast_input_dtype(x if self.placement[adapter] == "parallel" else y, down.weight.dtype)
        if isinstance(depthwise, nn.Identity):
            z = down(spec.pad(z, down.kernel_size))
        else:
            # Without a bias, `down` maps padding to padding. So pad its output, which has fewer channels.
            z = depthwise(spec.pad(down(z), depthwise.kernel_size))
        return up(activation(z))

    def why_not_mergeable(self, adapter: str) -> str | None:
        """Return why an adapter cannot be merged into the kernel of the base layer, or None if it can."""
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
        """Return the kernel, (C_out, C_in, *kernel), of the convolution that a mergeable adapter computes."""
        down, depthwise, _, up = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        kernel = down.weight if isinstance(depthwise, nn.Identity) else down.weight * depthwise.weight
        kernel = torch.tensordot(up.weight.flatten(1), kernel, dims=1)
        return F.pad(kernel, self.spec.margins(self._kernel_size(adapter)))

    def _merged_tensors(self, adapters: list[str]) -> dict[str, Tensor]:
        kernel = self._base_tensor("weight")
        assert kernel is not None
        return {"weight": sum((self.get_delta_weight(name) for name in adapters), start=kernel)}


class AdapterBatchNormLayer(BatchNormLayer):
    """The `BatchNormLayer` of ConvAdapter."""

    adapter_layer_names = ("conv_adapter_norm",)
