"""Convolutions in one to three dimensions, and separate functions for their gradients.

Autograd's convolution always saves its input. If the kernel is frozen, `lean_convolution` saves only the kernel. If the
kernel is trainable, `lean_convolution` also saves the input or, if the input can be recomputed from other tensors,
these tensors.

Shapes: `x` is (B, C_in, *size). The output y and its gradient `grad_y` are (B, C_out, *output size). `weight` is
(C_out, C_in/g, *kernel) with g groups. `bias` is (C_out,) or None. In formulas, * denotes the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor

from peft_edge._compat import AutogradContext, ConvolutionBase, f_pad_sides, is_transforming
from peft_edge.functional.recompute import (
    Recomputation,
    Step,
    get_recompute,
    memory_format_of,
    set_recompute,
)

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """Stride, zero padding and dilation of a convolution (one number per spatial dimension), and number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """The number of zeros that are added at each end of a dimension."""
    dilation: tuple[int, ...]
    groups: int = 1


def pad(conv: ConvolutionBase, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return a tensor and a `Geometry` for which `convolution` computes the output of the layer `conv` for the input x.

    The padding of a `Geometry` adds the same number of zeros at both ends of a dimension. If `conv` pads in another
    way, the returned tensor is already padded. Examples are reflection padding, unequal sides, and timm's same-padding.
    """
    padding, recompute = conv.padding, None
    if isinstance(conv, Conv2dSame):
        padding, recompute = (0, 0), partial(_pad_same, conv=conv)
    elif conv.padding_mode != "zeros" or isinstance(padding, str):
        # `sides` holds (before, after) for each dimension, the last dimension first.
        sides = f_pad_sides(conv)
        if conv.padding_mode == "zeros" and sides[::2] == sides[1::2]:
            padding = tuple(sides[::-2])
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            padding, recompute = (0,) * len(conv.kernel_size), partial(_pad, sides=sides, mode=mode)
    geometry = Geometry(conv.stride, padding, conv.dilation, conv.groups)
    if recompute is None:
        return x, geometry
    padded = recompute(x)
    if padded is not x and needs_backward():
        set_recompute(padded, get_recompute(x).then(recompute))
    return padded, geometry


def _pad(x: Tensor, *, sides: tuple[int, ...], mode: str, overwrite: bool = False) -> Tensor:
    return F.pad(x, sides, mode=mode)


def _pad_same(x: Tensor, *, conv: Conv2dSame, overwrite: bool = False) -> Tensor:
    return pad_same(x, conv.kernel_size, conv.stride, conv.dilation)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Run `F.conv1d`, `F.conv2d` or `F.conv3d`, depending on the number of dimensions of `geometry`."""
    return _CONVOLUTIONS[len(geometry.stride)](x, weight, bias, *geometry)


def input_gradient(grad_y: Tensor, weight: Tensor, x_size: torch.Size, geometry: Geometry) -> Tensor:
    """Return the gradient of x, of shape `x_size`, for y = conv(x; weight)."""
    stride, padding, dilation, groups = geometry
    # `aten.convolution_backward` returns the same gradient, but requires an input tensor and copies this tensor.
    output_padding = tuple(
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, k, s, p, d in zip(
            x_size[2:], grad_y.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return torch.convolution(grad_y, weight, None, stride, padding, dilation, True, output_padding, groups)


def kernel_gradient(grad_y: Tensor, x: Tensor, weight_size: torch.Size, geometry: Geometry) -> Tensor:
    """Return the gradient of the kernel, of shape `weight_size`, for y = conv(x; weight)."""
    stride, padding, dilation, groups = geometry
    # `convolution_backward` reads only the shape and memory format of `weight`, so the values need not be set. An
    # expanded scalar would not save memory, because `convolution_backward` would copy it.
    weight = torch.empty(weight_size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups, (False, True, False)
    )[1]


def recomputed_kernel_gradient(
    grad_y: Tensor, node: Recomputation, inputs: Sequence[Tensor], weight_size: torch.Size, geometry: Geometry
) -> Tensor:
    """Return the same gradient as `kernel_gradient`, for the x that `node` recomputes from `inputs`.

    A large x is recomputed in batches of samples, and the gradients of the batches are added.
    """
    total = None
    for x, grad in node.batches(inputs, grad_y):
        # Under autocast the gradient and x have different dtypes.
        part = kernel_gradient(grad, x.to(grad.dtype), weight_size, geometry)
        total = part if total is None else total.add_(part)
    return cast(Tensor, total)


def lean_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *, recompute: bool = False
) -> Tensor:
    """Convolve x, and save x only if the kernel is trainable.

    If x can be recomputed from other tensors, the function saves these tensors instead of x. With `recompute`, the
    functions that receive the output do not save the output, but recompute it in their backward pass. This applies only
    if x, or the tensors from which x can be recomputed, are saved anyway.

    >>> x, weight = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    >>> y = lean_convolution(x, weight, None, Geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1)))
    >>> [saved.shape for saved in y.grad_fn.saved_tensors]
    [torch.Size([4, 3, 3, 3])]
    """
    if not needs_backward():
        return convolution(x, weight, bias, geometry)
    y = _LeanConvolution.apply(x, weight, bias, geometry)
    return note_convolution(y, x, partial(_recompute_convolution, geometry=geometry), weight, bias) if recompute else y


def note_convolution(y: Tensor, x: Tensor, step: Step, *operands: Tensor | None) -> Tensor:
    """Store on the output y of a convolution how to recompute y from the input x, and return y.

    Nothing is stored unless a function saves x or the tensors from which x can be recomputed. `step` and `operands` are
    the arguments of `Recompute.then`.
    """
    source = get_recompute(x)
    if not source.node.inputs_are_saved:
        return y
    return set_recompute(y, source.then(step, *operands, is_convolution=True, shrinks=y.numel() <= x.numel()))


def _recompute_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, geometry: Geometry, overwrite: bool
) -> Tensor:
    return convolution(x, weight, bias, geometry)


class _LeanConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        node, inputs = get_recompute(x)
        trains_weight = ctx.needs_input_grad[1]
        ctx.x = node.add_user() if trains_weight else None
        ctx.save_for_backward(weight, *(inputs if trains_weight else ()))
        y = convolution(x, weight, bias, geometry)
        ctx.x_size, ctx.geometry, ctx.memory_format = x.shape, geometry, memory_format_of(y)
        return y

    @staticmethod
    def backward(ctx: AutogradContext, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # Pooling returns contiguous gradients even for channels-last maps. Restore the memory format of y.
        grad_y = grad_y.contiguous(memory_format=ctx.memory_format)
        weight, *inputs = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        # Under autocast the gradient and the weight have different dtypes.
        if wants_weight:
            grad_weight = recomputed_kernel_gradient(grad_y, ctx.x, inputs, weight.shape, ctx.geometry)
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_y.sum([0, *range(2, grad_y.dim())])
        if wants_x:  # compute dX last, because the recomputed input is freed by now
            grad_x = input_gradient(grad_y, weight.to(grad_y.dtype), ctx.x_size, ctx.geometry)
        return grad_x, grad_weight, grad_bias, None


def needs_backward() -> bool:
    """Return whether gradients are enabled and the autograd functions of this package can run.

    `torch.jit.trace` cannot record these autograd functions. `torch.func` and forward-mode differentiation need rules
    that these functions do not define.
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing() and not is_transforming()
