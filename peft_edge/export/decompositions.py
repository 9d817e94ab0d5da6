"""Replace the backward operators of a training step by forward operators, which inference runtimes support.

PyTorch's core decompositions do not decompose `convolution_backward` and `avg_pool2d_backward`. This module replaces
both operators by convolutions and matrix products. It also replaces a frozen BatchNorm by a scale and a shift, and the
gradients of some activations by products with masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

from peft_edge.functional.convolution import Geometry

aten = torch.ops.aten


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decomposition table of `capture_graph`: a dict from operators to replacement functions.

    The table contains PyTorch's core decompositions and the functions of this module.
    """
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for operator in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default):
        table[operator] = _frozen_batch_norm
    for operator in (aten.hardswish.default, aten.hardsigmoid.default, aten.silu.default):
        table.pop(operator, None)  # not decomposed, because `onnx_graph` converts these operators directly
    table[aten.copy.default] = _copy
    table[aten.convolution_backward.default] = _convolution_backward
    table[aten.avg_pool2d_backward.default] = _avg_pool2d_backward
    table[aten.threshold_backward.default] = _threshold_backward
    table[aten.hardtanh_backward.default] = _hardtanh_backward
    table[aten.hardswish_backward.default] = _hardswish_backward
    table[aten.hardsigmoid_backward.default] = _hardsigmoid_backward
    return table


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return `source` with the dtype and the shape of `target`."""
    return source.to(target.dtype).expand(target.shape)


# The following functions multiply gradients by masks. `torch.where` would need more memory, because ONNX Runtime
# allocates two additional tensors for the operator `Where`.


def _threshold_backward(grad: Tensor, y: Tensor, threshold: float) -> Tensor:
    return grad * (y > threshold).to(grad.dtype)


def _hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return grad * ((x > low) & (x < high)).to(grad.dtype)


def _hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    inside, above = (x > -3) & (x < 3), x >= 3
    return grad * ((x / 3 + 0.5) * inside.to(grad.dtype) + above.to(grad.dtype))


def _hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    # PyTorch's kernel rounds the factor 1/6 to single precision, even for tensors in double precision.
    return grad * (((x > -3) & (x < 3)).to(grad.dtype) * float(np.float32(1 / 6)))


def _frozen_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `x` with the stored statistics `mean` and `var`, by a scale and a shift for each channel.

    Return the normalised tensor and two empty tensors. In place of the empty tensors, `native_batch_norm` returns the
    statistics of the batch if `training` is True. This function always uses the stored statistics, and ignores
    `training`. It may do so, because `check_exportable` has rejected layers that use batch statistics before the
    capture.
    """
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.view(shape) + shift.view(shape), x.new_empty(0), x.new_empty(0)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, `weight` and the bias. A gradient is None if its entry in `wanted` is False."""
    if transposed:
        raise NotImplementedError(
            "the training step cannot be exported: it needs the gradient of a transposed convolution"
        )
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    grad_x = _input_gradient(grad, weight, x.shape, geometry) if wanted[0] else None
    # PyTorch's `convolution_backward` returns a contiguous gradient of the kernel, and the captured graph may contain
    # views that need this memory layout.
    grad_weight = _kernel_gradient(grad, x, weight.shape, geometry).contiguous() if wanted[1] else None
    return grad_x, grad_weight, grad.sum([0, *range(2, grad.dim())]) if wanted[2] else None


def _input_gradient(grad: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's input, of shape `size`. `grad` is the gradient of the output."""
    stride, padding, dilation, groups = geometry
    kernel = weight.shape[2:]
    border = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if all(s == 1 for s in stride) and min(border) >= 0:
        # Convolve `grad` with the flipped kernel, whose input and output channels are swapped within each group.
        turned = weight.flip(list(range(2, weight.dim()))) if max(kernel) > 1 else weight
        split = turned.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
        turned = split.reshape(size[1], -1, *kernel)
        return aten.convolution.default(grad, turned, None, [1] * len(stride), border, dilation, False, [0], groups)
    rest = [
        n - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, out, k, s, p, d in zip(size[2:], grad.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return aten.convolution.default(grad, weight, None, stride, padding, dilation, True, rest, groups)


def _kernel_gradient(grad: Tensor, x: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's kernel, of shape `size`. `grad` is the gradient of the output."""
    stride, padding, dilation, groups = geometry
    batch, (rows, columns), kernel = len(x), size[:2], size[2:]
    if groups == 1 and all(k == 1 for k in kernel) and not any(padding):
        for dim, step in enumerate(stride, start=2):
            x = x.movedim(dim, 0)[::step].movedim(0, dim) if step > 1 else x
        left, right = grad.reshape(batch, rows, -1), x.reshape(batch, columns, -1)
        # Transpose the smaller tensor: `right` if `x` has fewer channels than `grad`, otherwise `left`.
        if rows > columns:
            return (left @ right.transpose(1, 2)).sum(0).reshape(size)
        return (right @ left.transpose(1, 2)).sum(0).t().reshape(size)
    # Convolve `images` with the kernel `grad`. The batch dimension of `images` holds the input channels of a group. The
    # channel dimension of `images` has one block for each group, and each block has one channel for each sample. The
    # convolution sums over the channels of a block, and so over the samples. The `stride` of the forward pass becomes
    # the dilation of this convolution, and the `dilation` of the forward pass becomes the stride.
    images = x.reshape(batch, groups, columns, *x.shape[2:]).transpose(0, 2).reshape(columns, -1, *x.shape[2:])
    found = aten.convolution.default(
        images, grad.transpose(0, 1), None, dilation, padding, stride, False, [0] * len(stride), groups
    )
    for dim, k in enumerate(kernel, start=2):
        found = found.narrow(dim, 0, k) if found.shape[dim] > k else found
    return found.transpose(0, 1)


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Return the gradient of `x`, computed by a transposed depthwise convolution of `grad` with a constant kernel."""
    kernel = list(kernel_size) * (2 // len(kernel_size))
    step = list(stride or kernel_size) * (2 // len(stride or kernel_size))
    covered = [(out - 1) * s + k for out, s, k in zip(grad.shape[2:], step, kernel, strict=True)]
    if any(padding) or any(c > n for c, n in zip(covered, x.shape[2:], strict=True)):
        raise NotImplementedError(
            "the training step cannot be exported: it needs the gradient of an average pool with padding, or with "
            "ceil_mode at an odd size"
        )
    weight = grad.new_full((x.shape[1], 1, *kernel), 1 / (divisor_override or kernel[0] * kernel[1]))
    rest = [n - c for n, c in zip(x.shape[2:], covered, strict=True)]
    return aten.convolution.default(grad, weight, None, step, [0, 0], [1, 1], True, rest, x.shape[1])
