"""What an adapter beside a layer must know of it: channels, and where in the input its outputs lie."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from peft_edge.roles import Convolution, named_convolutions

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
