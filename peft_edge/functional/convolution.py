"""Convolutions with plain geometry, their gradients one by one, and the convolution of a frozen kernel.

Autograd's convolution keeps its input whether or not the kernel is trained. Here each gradient is a function of its
own, so that who needs only the gradient of the input keeps only the kernel. In one to three spatial dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """How a kernel moves over a zero-padded input."""

    stride: tuple[int, ...]
    """For each spatial dimension."""
    padding: tuple[int, ...]
    """Zeros on either side, for each spatial dimension."""
    dilation: tuple[int, ...]
    """For each spatial dimension."""
    groups: int = 1


def pad(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> tuple[Tensor, Geometry]:
    """The input that a layer gives to its convolution, and the geometry of that one.

    What is no zero padding of the same width on both sides (other padding modes, timm's same-padding) is put into the
    input; else the input stays as it is.

    Args:
        conv: a plain convolution; its weight is not looked at.
        x: (B, C_in, *size).
    """
    padding = conv.padding
    if isinstance(conv, Conv2dSame):
        x, padding = pad_same(x, conv.kernel_size, conv.stride, conv.dilation), (0, 0)
    elif conv.padding_mode != "zeros" or isinstance(padding, str):
        # (before, after) of the last dimension first, as `F.pad` takes them.
        twice = conv._reversed_padding_repeated_twice
        if conv.padding_mode == "zeros" and twice[::2] == twice[1::2]:
            padding = tuple(twice[::-2])
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x, padding = F.pad(x, twice, mode=mode), (0,) * len(conv.kernel_size)
    return x, Geometry(conv.stride, padding, conv.dilation, conv.groups)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution itself, with autograd's own backward.

    Args:
        x: (B, C_in, *size).
        weight: (C_out, C_in/g, *kernel).
        bias: (C_out,) or None.
        geometry: how the kernel moves.
    """
    return _CONVOLUTIONS[len(geometry.stride)](x, weight, bias, *geometry)


def input_gradient(grad_output: Tensor, weight: Tensor, x_size: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's input.

    Args:
        grad_output: (B, C_out, *output size).
        weight: (C_out, C_in/g, *kernel).
        x_size: (B, C_in, *size), the result's.
        geometry: how the kernel moves.
    """
    stride, padding, dilation, groups = geometry
    # `aten.convolution_backward` does the same but wants an input, of which it copies what is not real memory.
    rests = tuple(
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, k, s, p, d in zip(
            x_size[2:], grad_output.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return torch.convolution(grad_output, weight, None, stride, padding, dilation, True, rests, groups)


def kernel_gradient(grad_output: Tensor, x: Tensor, weight_size: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's kernel.

    Args:
        grad_output: (B, C_out, *output size).
        x: (B, C_in, *size).
        weight_size: (C_out, C_in/g, *kernel), the result's.
        geometry: how the kernel moves.
    """
    stride, padding, dilation, groups = geometry
    # Only its shape and format count; one element, expanded, would be copied to a kernel of this format.
    weight = torch.empty(weight_size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups, (False, True, False)
    )[1]


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a (B, C, *size) tensor, contiguous where there is a choice."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def needs_backward() -> bool:
    """Whether what runs now may be differentiated; `torch.jit.trace` would record a backward that it cannot save."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        y = convolution(x, weight, bias, geometry)
        ctx.x_size, ctx.geometry, ctx.memory_format = x.shape, geometry, memory_format(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A pooled map's gradient is contiguous, and all that comes of it would be.
        grad_output = gradients[0].contiguous(memory_format=ctx.memory_format)
        (weight,) = ctx.saved_tensors
        # Under autocast the gradient has a type of its own.
        return input_gradient(grad_output, weight.to(grad_output.dtype), ctx.x_size, ctx.geometry), None, None, None


def frozen_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution whose kernel and bias are constants: its backward keeps the kernel and not the input.

    Args:
        x: (B, C_in, *size).
        weight: (C_out, C_in/g, *kernel).
        bias: (C_out,) or None.
        geometry: how the kernel moves.
    """
    if not needs_backward():
        return convolution(x, weight, bias, geometry)
    return _FrozenConvolution.apply(x, weight, bias, geometry)
