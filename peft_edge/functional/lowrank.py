"""Convolution with a low-rank update of its kernel (LoRA and DoRA), and its backward pass.

In formulas, W is `weight`, A is `lora_a`, B is `lora_b`, s is `scaling`, m is `magnitude` and f is `factor`. W has the
shape (C_out, C_in/g, *kernel) and is read as a matrix (C_out, K) with K = C_in/g * prod(kernel). LoRA (Hu et al. 2021,
arXiv 2106.09685) adds s B A to W, with A of shape (r, K) and B of shape (C_out, r). For one group the update is a
convolution with the kernel A followed by a 1x1 convolution with B. For a depthwise convolution A holds r spatial
kernels that all channels share. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) multiplies each row of W + s B A by
f = m / ||W + s B A||, where the norm is taken over the row and m is trainable. Without a magnitude, f = 1.

The forward pass computes the kernel W' and runs one convolution, written as *:

    W' = f (W + s B A),    y = x * W' + bias

The backward pass recomputes W' instead of saving W'. dY and dW' are the gradients of y and W'. The gradient dX of x
needs only dY and W'. The map z = x * A and its gradient u = (s f B)^T dY have r channels. There are two exact ways to
compute the gradients dA and dB, called routes:

    full_kernel:   dA = (s f B)^T dW'                            dB = s f dW' A^T
    low_rank:      dA = kernel gradient of z = x * A, given u    dB = s f dY z^T

`full_kernel` computes dW'. This takes many multiplications, but reads x and dY only once. `low_rank` avoids dW'. It
runs four convolutions with r channels instead, which take few multiplications, but read x and dY twice.
`lowrank_keeps_input` returns whether x is saved. If only B is trainable (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303),
`low_rank` saves z instead of x.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge._compat import AutogradContext
from peft_edge.functional.convolution import (
    Geometry,
    convolution,
    input_gradient,
    kernel_gradient,
    needs_backward,
    note_convolution,
    recomputed_kernel_gradient,
)
from peft_edge.functional.recompute import get_recompute, memory_format_of

GradientRoute = Literal["full_kernel", "low_rank"]


def lowrank_conv2d(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    geometry: Geometry,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    route: GradientRoute | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return conv(x; f (W + s B A)) + bias, in one to three dimensions.

    The factor f = m / ||W + s B A|| of DoRA is 1 if `magnitude` is None. `weight` and `scaling` get no gradients. The
    function runs only standard operators, which FLOP counters, fake tensors, compilers and exporters support.

    >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(8, 3, 3, 3)
    >>> lora_a, lora_b = torch.randn(4, 3, 3, 3), torch.zeros(8, 4, 1, 1)
    >>> y = lowrank_conv2d(x, weight, lora_a, lora_b, 0.5, geometry=Geometry((1, 1), (1, 1), (1, 1)))
    >>> torch.equal(y, F.conv2d(x, weight, padding=1))  # B = 0
    True

    Args:
        x: (B, C_in, *size).
        weight: The frozen kernel W, (C_out, C_in/g, *kernel).
        lora_a: A, (r, C_in/g, *kernel).
        lora_b: B, (C_out, r, 1, ...).
        scaling: The factor s of the update.
        geometry: Stride, padding, dilation and groups.
        bias: (C_out,) or None.
        magnitude: DoRA's m, with C_out elements in any shape. None for LoRA.
        route: How to compute the gradients of A and B: from the gradient of the whole kernel (`full_kernel`) or from
            feature maps with r channels (`low_rank`). None chooses `full_kernel` for a grouped kernel or a trainable
            magnitude. For all other kernels, None chooses `low_rank` if A is frozen. If A is trainable,
            `choose_gradient_route` estimates which route is faster.
        recompute: Whether the functions that receive y do not save y, but recompute it in their backward pass.
            This applies only if x is saved anyway.

    Raises:
        ValueError: If `route` is "low_rank" for a grouped kernel or a trainable magnitude.
        RuntimeError: In the backward pass, if a second derivative needs x and x was not saved.
    """
    if not needs_backward():
        return convolution(x, _composed_kernel(weight, lora_a, lora_b, magnitude, scaling), bias, geometry)
    trains_magnitude = magnitude is not None and magnitude.requires_grad
    if route == "low_rank" and (geometry.groups > 1 or trains_magnitude):
        raise ValueError(
            "lowrank_conv2d: route is 'low_rank', which requires one group and no trainable magnitude; found "
            f"{geometry.groups} groups and {'a' if trains_magnitude else 'no'} trainable magnitude. Use 'full_kernel' "
            "or None."
        )
    y = _LowRankConvolution.apply(x, weight, lora_a, lora_b, magnitude, bias, scaling, geometry, route)
    if not recompute:
        return y
    step = partial(_recompute_lowrank, scaling=scaling, geometry=geometry)
    return note_convolution(y, x, step, weight, lora_a, lora_b, magnitude, bias)


def _recompute_lowrank(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float | Tensor,
    geometry: Geometry,
    overwrite: bool,
) -> Tensor:
    return convolution(x, _composed_kernel(weight, lora_a, lora_b, magnitude, scaling), bias, geometry)


def lowrank_keeps_input(
    groups: int, *, trains_a: bool, trains_b: bool, trains_magnitude: bool = False, route: GradientRoute | None = None
) -> bool:
    """Return whether the backward pass of `lowrank_conv2d` needs x.

    If so, the forward pass saves x. If x can be recomputed from other tensors, it saves these tensors instead. The
    gradients of A and of the magnitude need x. The gradient of B needs x only if the kernel is grouped, or if the route
    is `full_kernel`, which computes the gradient of the whole kernel.
    """
    return trains_a or trains_magnitude or (trains_b and (groups > 1 or route == "full_kernel"))


def _composed_kernel(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, scaling: float | Tensor
) -> Tensor:
    """Return W' = f (W + s B A). DoRA's factor f is 1 if `magnitude` is None."""
    kernel = _updated_kernel(weight, lora_a, lora_b, scaling)
    factor = None if magnitude is None else dora_scale(kernel, magnitude)
    return _scaled(kernel, factor, weight.dtype, inplace=True)


class _LowRankConvolution(torch.autograd.Function):
    """y = conv(x; W') + bias with W' = f (W + s B A) and DoRA's factor f. The module docstring states the gradients."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        bias: Tensor | None,
        scaling: float | Tensor,
        geometry: Geometry,
        route: GradientRoute | None,
    ) -> Tensor:
        _, _, trains_a, trains_b, trains_magnitude, *_ = ctx.needs_input_grad
        if lowrank_keeps_input(
            geometry.groups, trains_a=trains_a, trains_b=trains_b, trains_magnitude=trains_magnitude, route=route
        ):
            z = None
            node, saved_x = get_recompute(x)
            ctx.x = node.add_user()
        else:
            z = _down_projection(x, lora_a.to(x.dtype), geometry) if trains_b else None
            ctx.x, saved_x = None, ()
        ctx.save_for_backward(z, weight, lora_a, lora_b, magnitude, *saved_x)
        y = convolution(x, _composed_kernel(weight, lora_a, lora_b, magnitude, scaling), bias, geometry)
        if ctx.x is None:
            route = "low_rank"
        elif trains_magnitude:
            route = "full_kernel"
        ctx.route = route or choose_gradient_route(x, y, weight.shape, len(lora_a))
        ctx.x_size, ctx.memory_format = x.shape, memory_format_of(y)
        ctx.scaling, ctx.geometry = scaling, geometry
        return y

    @staticmethod
    def backward(ctx: AutogradContext, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # Pooling returns contiguous gradients even for channels-last maps. Restore the memory format of y.
        grad_y = grad_y.contiguous(memory_format=ctx.memory_format)
        z, weight, lora_a, lora_b, magnitude, *saved_x = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, wants_magnitude, wants_bias, *_ = ctx.needs_input_grad
        scaling, geometry = ctx.scaling, ctx.geometry
        dtype = grad_y.dtype  # under autocast, the parameters have another dtype
        kernel = factor = None
        if magnitude is not None:
            kernel = _updated_kernel(weight, lora_a, lora_b, scaling)
            factor = dora_scale(kernel, magnitude)

        grad_x = grad_a = grad_b = grad_magnitude = grad_bias = None
        if ctx.route == "full_kernel":
            # Apply `row_scaling` to B and to the rows of `grad_b`. Scaling `grad_kernel` (dW') would need a second
            # tensor of its size.
            grad_kernel = recomputed_kernel_gradient(grad_y, ctx.x, saved_x, weight.shape, geometry)
            grad_kernel = grad_kernel.to(lora_a.dtype)
            layout = memory_format_of(grad_kernel)
            rows = as_matrix(grad_kernel, layout)
            row_scaling = scaling if factor is None else factor.flatten(1) * scaling
            if wants_a:  # dA = (s f B)^T dW'
                scaled_b = (lora_b.flatten(1) * row_scaling).to(rows.dtype)
                grad_a = as_kernel(scaled_b.mT @ rows, lora_a.shape, layout)
            if wants_b:  # dB = s f dW' A^T
                grad_b = (rows @ as_matrix(lora_a, layout).mT * row_scaling).view(lora_b.shape)
            if wants_magnitude and kernel is not None:  # dm = row_sum(dW' * V) / ||V||, V = W + s B A
                inverse_norm = dora_scale(kernel, torch.ones_like(magnitude)).flatten()
                products = torch.linalg.vecdot(rows, as_matrix(kernel, layout)) * inverse_norm
                grad_magnitude = products.to(magnitude.dtype).view_as(magnitude)
            del grad_kernel, rows
        else:
            if ctx.x is None and z is not None and torch.is_grad_enabled():
                raise RuntimeError(
                    "lowrank_conv2d: with lora_a frozen the input is not saved, so there is no second derivative. "
                    "Pass route='full_kernel', which saves the input."
                )
            pointwise = _pointwise(grad_y)
            scaled_b = _scaled(lora_b * scaling, factor, dtype)
            grad_scaled_b: Tensor | None = None
            for x, grad in [(None, grad_y)] if ctx.x is None else ctx.x.batches(saved_x, grad_y):
                if x is not None:
                    x = x.to(dtype)
                    if wants_b:
                        z = _down_projection(x, lora_a.to(dtype), geometry)
                if z is not None:  # dB = s f dY z^T
                    product = kernel_gradient(grad, z.to(dtype), lora_b.shape, pointwise)
                    grad_scaled_b = product if grad_scaled_b is None else grad_scaled_b.add_(product)
                if x is not None and wants_a:  # u = (s f B)^T dY; dA is the kernel gradient for x and u
                    u_size = torch.Size([len(x), len(lora_a), *grad.shape[2:]])
                    u = input_gradient(grad, scaled_b, u_size, pointwise)
                    product = kernel_gradient(u, x, lora_a.shape, geometry)
                    grad_a = product if grad_a is None else grad_a.add_(product)
            del x
            if grad_scaled_b is not None:
                grad_b = _scaled(grad_scaled_b * scaling, factor, lora_b.dtype)
        if wants_bias:
            grad_bias = grad_y.sum([0, *range(2, grad_y.dim())])
        if wants_x:  # compute dX last, because the temporaries of the other gradients are freed by now
            kernel = _updated_kernel(weight, lora_a, lora_b, scaling) if kernel is None else kernel
            grad_x = input_gradient(grad_y, _scaled(kernel, factor, dtype, inplace=True), ctx.x_size, geometry)
        return grad_x, None, grad_a, grad_b, grad_magnitude, grad_bias, None, None, None


def _down_projection(x: Tensor, lora_a: Tensor, geometry: Geometry) -> Tensor:
    """Return z = conv(x; A), which has r channels."""
    if geometry == _pointwise(x) and lora_a[0, 0].numel() == 1 and memory_format_of(x) != torch.contiguous_format:
        # On a CPU, `F.linear` takes about half the time of a convolution with r channels.
        return F.linear(x.movedim(1, -1), lora_a.flatten(1)).movedim(-1, 1)
    return convolution(x, lora_a, None, geometry)


def _pointwise(x: Tensor) -> Geometry:
    """Return the geometry of a 1x1 convolution of x: stride 1, no padding, dilation 1, one group."""
    dims = x.dim() - 2
    return Geometry((1,) * dims, (0,) * dims, (1,) * dims)


def _updated_kernel(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    """Return W + s B A."""
    update = lowrank_kernel(lora_a, lora_b, scaling, weight.shape, memory_format_of(weight))
    # If the dtypes agree, an addition in place allocates one kernel instead of two.
    return update.add_(weight) if update.dtype == weight.dtype else update + weight


def _scaled(tensor: Tensor, factor: Tensor | None, dtype: torch.dtype, *, inplace: bool = False) -> Tensor:
    """Return `tensor * factor` in `dtype`.

    With `inplace`, the result may overwrite `tensor`, unless gradients are enabled.
    """
    if factor is None:
        return tensor.to(dtype)
    if inplace and factor.dtype == tensor.dtype and not torch.is_grad_enabled():
        return tensor.mul_(factor).to(dtype)
    return (tensor * factor).to(dtype)


def lowrank_kernel(
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    shape: torch.Size,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return the kernel update `scaling * lora_b @ lora_a` in `shape`, (C_out, C_in/g, *kernel).

    `lora_a` has the shape (r, C_in/g, *kernel). `lora_b` has the shape (C_out, r) or (C_out, r, 1, ...). The result has
    the given `memory_format`. If the kernel of the convolution has the same memory format, adding the update to this
    kernel needs no copy.

    >>> lora_a, lora_b = torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1)
    >>> lowrank_kernel(lora_a, lora_b, 0.5, torch.Size([4, 3, 1, 1])).flatten(1)[0]
    tensor([1., 1., 1.])
    """
    # Scaling `lora_b` instead of the product avoids a second tensor of the size of the kernel.
    return as_kernel((lora_b.flatten(1) * scaling) @ as_matrix(lora_a, memory_format), shape, memory_format)


def dora_scale(kernel: Tensor, magnitude: Tensor) -> Tensor:
    """Return DoRA's factor `magnitude / ||kernel||` of each output channel, in the shape (C_out, 1, ...).

    `kernel` has the shape (C_out, C_in/g, *size), and `magnitude` has C_out elements in any shape. Autograd treats the
    norm of each output channel as a constant (Liu et al. 2024, arXiv 2402.09353, section 4.3).

    >>> kernel = torch.randn(4, 3, 3, 3)
    >>> scaled = kernel * dora_scale(kernel, torch.ones(4))
    >>> torch.allclose(scaled.flatten(1).norm(dim=1), torch.ones(4))
    True
    """
    norm = as_matrix(kernel.detach(), memory_format_of(kernel)).norm(dim=1).to(magnitude.dtype)
    # The scaled kernel of an all-zero channel must stay zero instead of becoming NaN.
    scale = magnitude.flatten() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return scale.view(-1, *[1] * (kernel.dim() - 1))


def as_matrix(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return `kernel` as a matrix (C_out, K) with columns in the order of `memory_format`, as a view if possible."""
    return (kernel if memory_format == torch.contiguous_format else kernel.movedim(1, -1)).flatten(1)


def as_kernel(matrix: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """Undo `as_matrix`: return `matrix`, (C_out, K), as a kernel of the given shape. The kernel is a view."""
    if memory_format == torch.contiguous_format:
        return matrix.view(shape)
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


# Speeds of convolutions in the backward pass: FLOPs per second (a multiply-add is two), bytes of feature maps read per
# second, and seconds per call of a tiny convolution. The CPU speeds were measured on one core of an AMD EPYC (AVX2)
# with torch 2.15. The CUDA speeds are a guess for a large GPU. The speeds are not measured at run time, because
# measured speeds vary. With measured speeds, a resumed run could compute gradients by another route than before, and
# the two routes round differently.
_SPEEDS = {
    "cpu": {"channels_last": (60e9, 8e9, 20e-6), "contiguous": (60e9, 5e9, 20e-6)},
    "cuda": {"channels_last": (20e12, 1e12, 30e-6), "contiguous": (20e12, 1e12, 30e-6)},
}


def choose_gradient_route(x: Tensor, grad_y: Tensor, weight_size: torch.Size, rank: int) -> GradientRoute:
    """Return the route (way to compute the gradients of A and B) with the shorter estimated time.

    `full_kernel` computes the gradient of the whole kernel, and is the only route for a grouped kernel. `low_rank`
    computes feature maps with r channels instead. It is faster if the FLOPs that it saves take longer than the memory
    traffic and the calls that it adds. The result depends only on shapes, dtype, memory format and device.
    """
    c_out, columns = weight_size[0], weight_size[1:].numel()
    if weight_size[1] != x.shape[1]:
        # A grouped update is not a convolution with A followed by one with B, so `low_rank` cannot be used.
        return "full_kernel"
    positions = grad_y.numel() // c_out
    saved_flops = 2 * positions * (columns * c_out - 2 * rank * (columns + c_out))
    read_bytes = (x.numel() + grad_y.numel()) * x.element_size()
    speeds = _SPEEDS.get(x.device.type, _SPEEDS["cuda"])
    flops_per_s, bytes_per_s, call_s = speeds["contiguous" if x.is_contiguous() else "channels_last"]
    return "low_rank" if saved_flops / flops_per_s > read_bytes / bytes_per_s + 3 * call_s else "full_kernel"
