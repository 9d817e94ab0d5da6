"""Convolutions with plain geometry, their gradients one by one, and the convolution of a frozen kernel.

Autograd's convolution keeps its input whether or not the kernel is trained. Here each gradient is a function of its
own, so that who needs only the gradient of the input keeps only the kernel. In one to three spatial dimensions.

The kernels of low-rank adapters.

A kernel W of shape (C_out, C_in/g, *kernel) is read as a matrix (C_out, K) with K = C_in/g * prod(kernel). LoRA (Hu et
al. 2021, arXiv 2106.09685) adds s B A to it, with A of K columns and r rows and B of r columns and C_out rows. For one
group that is the chain of a full and a 1x1 convolution; for a depthwise convolution A holds r spatial kernels that all
channels share. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) then gives every output channel a trained length.
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


def as_matrix(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A kernel's matrix (C_out, K), with the columns in the order of a memory format: a view of a kernel that has it.

    Args:
        kernel: (C_out, C_in/g, *kernel).
        memory_format: contiguous, or of the channels-last kind.
    """
    return (kernel if memory_format == torch.contiguous_format else kernel.movedim(1, -1)).flatten(1)


def as_kernel(matrix: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """The view of a matrix as the kernel of that memory format, whose `as_matrix` it is.

    Args:
        matrix: (C_out, K).
        shape: (C_out, C_in/g, *kernel).
        memory_format: contiguous, or of the channels-last kind.
    """
    if memory_format == torch.contiguous_format:
        return matrix.view(shape)
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def lowrank_kernel(
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    shape: torch.Size,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The kernel update s B A, in the kernel's shape.

    Args:
        lora_a: (r, C_in/g, *kernel).
        lora_b: (C_out, r) with any number of trailing ones.
        scaling: s.
        shape: (C_out, C_in/g, *kernel) of the result.
        memory_format: of the result; that of the kernel which it is added to saves rearranging either.
    """
    # The scaling goes to the smaller factor: no second kernel is made.
    return as_kernel((lora_b.flatten(1) * scaling) @ as_matrix(lora_a, memory_format), shape, memory_format)


def dora_scale(kernel: Tensor, magnitude: Tensor) -> Tensor:
    """The factor that gives each output channel of `kernel` its DoRA length, shaped to broadcast over the kernel.

    The norm is a constant to autograd (DoRA, section 4.3).

    Args:
        kernel: (C_out, C_in/g, *kernel).
        magnitude: C_out elements in any shape.
    """
    norm = as_matrix(kernel.detach(), memory_format(kernel)).norm(dim=1).to(magnitude.dtype)
    # An all-zero channel has no direction: its scaled kernel stays zero instead of becoming NaN.
    scale = magnitude.flatten() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return scale.view(-1, *[1] * (kernel.dim() - 1))
