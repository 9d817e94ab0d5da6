"""Activations, gates and max-pooling that save fewer bytes for the backward pass than torch's functions.

- A clipped activation `min(max(x, 0), upper)`, such as ReLU or ReLU6, has the slope 0 or 1. The function
  `clipped_activation` saves the slopes as a mask of one byte or one bit per element. With `keep="output"`, it saves the
  output instead of a mask. This takes no further memory if the next layer saves the output anyway. If the input of
  `clipped_activation` can be recomputed from a tensor that another function saves, `clipped_activation` saves no
  further feature map. An example of such a tensor is the input of a BatchNorm in training mode.
- `smooth_activation`, which computes SiLU for example, saves its input. If this input can be recomputed from other
  tensors, the function saves these tensors instead.
- `gated_product` multiplies a feature map `x` by a `gate` per channel, as squeeze-excite does. The function saves
  `gate` and `x`. If `x` can be recomputed from other tensors, the function saves these tensors instead of `x`.
- `max_pool2d` saves its input. If this input can be recomputed from other tensors, the function saves these tensors
  instead. The backward pass finds the maxima again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge._compat import AutogradContext
from peft_edge.functional.recompute import (
    CACHED_ELEMENTS,
    Recomputation,
    Recompute,
    can_overwrite,
    get_recompute,
    has_standard_layout,
    set_recompute,
)


class Activation(Protocol):
    """An activation, such as `F.relu`."""

    def __call__(self, x: Tensor, /, *, inplace: bool = False) -> Tensor:
        """Return the activation of x. With `inplace`, overwrite x."""


class Derivative(Protocol):
    """A function that maps the output gradient dY and the input x (or the output y) to the input gradient dX."""

    def __call__(self, gradient: Tensor, value: Tensor, /, *, out: Tensor = ...) -> Tensor:
        """Return the gradient of the input.

        If `out` is given, write the result to `out`, which may be `gradient` itself.
        """


Kept = Literal["output", "byte", "bit"]
"""What a clipped activation saves: its output, or a mask of one byte or one bit per element."""


def clipped_activation(x: Tensor, forward: Activation, *, upper: float, keep: Kept, inplace: bool = False) -> Tensor:
    """Return `min(max(x, 0), upper)`, and save the output or a mask (`keep`) for the backward pass.

    If x can be recomputed from tensors that another function needs anyway, these tensors are saved instead, and `keep`
    is ignored. If the output is neither contiguous nor channels-last, it is saved instead of a mask. `forward` must
    compute the activation for x, and also for a one-dimensional part of x. `upper` is infinity for ReLU. With
    `inplace`, the output overwrites x.
    """
    source = get_recompute(x)
    # Recomputing x is cheap if it starts from a tensor that another function needs anyway. For example, x is the output
    # of a norm in training mode, which saves its own input. The slopes can be computed from x instead of y.
    is_cheap = not source.is_identity and source.node.is_used
    y = _ClippedActivation.apply(x, forward, upper, keep, inplace, source if is_cheap else None)
    recompute = source.then(partial(_activate, forward=forward), is_pointwise=True)
    return y if source.is_identity else set_recompute(y, recompute)


def _activate(x: Tensor, *, forward: Activation, overwrite: bool) -> Tensor:
    """Return `forward(x)`, in place if `overwrite` is set.

    This function is a step of a `Recomputation`, which calls its steps with the keyword `overwrite`.
    """
    return forward(x, inplace=overwrite)


class _ClippedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        forward: Activation,
        upper: float,
        keep: Kept,
        inplace: bool,
        source: Recompute | None,
    ) -> Tensor:
        ctx.upper, ctx.keep = upper, keep
        if source is not None:
            ctx.x = source.node.add_user()
            ctx.save_for_backward(*source.inputs)
            if inplace:
                ctx.mark_dirty(x)
            return forward(x, inplace=inplace)
        ctx.x = None
        # With `inplace`, `make_mask` applies the activation to one part of x at a time. It computes the mask of this
        # part while the part is in the cache.
        activates_parts = inplace and keep != "output" and has_standard_layout(x)
        y = x if activates_parts else forward(x, inplace=inplace)
        if inplace:
            ctx.mark_dirty(x)

        def has_slope_one(part: Tensor) -> Tensor:
            y = forward(part, inplace=True) if activates_parts else part
            # `_clip_gradient(y, y)` is nonzero where 0 < y < upper. Comparison operators are far slower on a CPU.
            return (y if upper == float("inf") else _clip_gradient(y, y, upper=upper)).bool()

        ctx.keep = keep if has_standard_layout(y) else "output"
        ctx.stride = y.stride()
        ctx.save_for_backward(y if ctx.keep == "output" else make_mask(y, has_slope_one, packed=keep == "bit"))
        return y

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        overwrites = can_overwrite(gradient)
        if ctx.x is not None:
            gradient = _map_parts(
                partial(_clip_gradient, upper=ctx.upper), gradient, ctx.x, ctx.saved_tensors, overwrites
            )
            return gradient, None, None, None, None, None
        (saved,) = ctx.saved_tensors
        if ctx.keep == "output":
            gradient = _clip_gradient(gradient, saved, upper=ctx.upper, out=gradient if overwrites else None)
        else:
            if gradient.stride() != ctx.stride:
                copied = torch.empty_strided(gradient.size(), ctx.stride, dtype=gradient.dtype, device=gradient.device)
                gradient, overwrites = copied.copy_(gradient), True
            if torch.is_grad_enabled():
                # Autograd will differentiate this backward pass, but `mask_gradient` has no derivative.
                is_set = mask_gradient(torch.ones_like(gradient), saved, out=torch.empty_like(gradient)).bool()
                gradient = torch.where(is_set, gradient, torch.zeros_like(gradient))
            else:
                out = gradient if overwrites else torch.empty_like(gradient)
                gradient = mask_gradient(gradient, saved, out=out)
        return gradient, None, None, None, None, None


def _map_parts(
    function: Derivative, gradient: Tensor, node: Recomputation, inputs: Sequence[Tensor], overwrites: bool
) -> Tensor:
    """Return `function(gradient, value)`, where `value` is the tensor that `node` recomputes from `inputs`.

    With `overwrites`, the result may overwrite `gradient`.
    """
    if torch.is_grad_enabled():
        return function(gradient, node.value(inputs))
    result = gradient if overwrites else torch.empty_like(gradient)
    for value, part, out in node.parts(inputs, gradient, result):
        function(part, value, out=out)
    return result


def _clip_gradient(gradient: Tensor, value: Tensor, *, upper: float, out: Tensor | None = None) -> Tensor:
    """Return `gradient` where 0 < value < upper, and 0 elsewhere. If `out` is given, write the result to `out`.

    `value` may be the input or the output of the activation, because both lie between 0 and `upper` at the same
    elements.
    """
    is_unbounded = upper == float("inf")
    operator = torch.ops.aten.threshold_backward if is_unbounded else torch.ops.aten.hardtanh_backward
    bounds = (0,) if is_unbounded else (0, upper)
    if out is None:
        return operator(gradient, value, *bounds)
    return operator.grad_input(gradient, value, *bounds, grad_input=out)


def smooth_activation(x: Tensor, forward: Activation, backward: Derivative, *, inplace: bool = False) -> Tensor:
    """Return `forward(x)`. Save x or, if x can be recomputed from other tensors, these tensors.

    `backward` must map two tensors, the output gradient and the input x, to the input gradient. It must accept the
    keyword argument `out`. With `inplace`, the output overwrites x, and a copy of x is saved if x cannot be recomputed.
    """
    kept = x.clone() if inplace and get_recompute(x).is_identity else x
    source = get_recompute(kept)
    y = _SmoothActivation.apply(kept, x if inplace else None, forward, backward)
    return set_recompute(y, source.then(partial(_activate, forward=forward), is_pointwise=True))


class _SmoothActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, overwritten: Tensor | None, forward: Activation, backward: Derivative
    ) -> Tensor:
        ctx.forward_of_x, ctx.backward_of_x = forward, backward
        node, inputs = get_recompute(x)
        ctx.x = node.add_user()
        ctx.save_for_backward(*inputs)
        if overwritten is None:
            return forward(x)
        ctx.mark_dirty(overwritten)
        return forward(overwritten, inplace=True)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        overwrites = can_overwrite(gradient)
        if torch.is_grad_enabled():
            # Autograd will differentiate this backward pass, but most of torch's backward operators have no derivative.
            x = ctx.x.value(ctx.saved_tensors)
            return *torch.autograd.grad(ctx.forward_of_x(x), x, gradient, create_graph=True), None, None, None
        return _map_parts(ctx.backward_of_x, gradient, ctx.x, ctx.saved_tensors, overwrites), None, None, None


def silu_gradient(gradient: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the input gradient of SiLU for the output gradient `gradient` and the input x.

    If `out` is given, write the result to `out`.
    """
    operator = torch.ops.aten.silu_backward
    return operator(gradient, x) if out is None else operator.grad_input(gradient, x, grad_input=out)


def gated_product(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * gate, for x of shape (B, C, *size) and `gate` of shape (B, C, 1, ...).

    The function saves `gate` and x. If x can be recomputed from other tensors, it saves these tensors instead of x.
    """
    y = _GatedProduct.apply(x, gate)
    return set_recompute(y, get_recompute(x).then(_multiply, gate))


def _multiply(x: Tensor, gate: Tensor, *, overwrite: bool) -> Tensor:
    return x.mul_(gate) if overwrite else x * gate


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, gate: Tensor) -> Tensor:
        node, inputs = get_recompute(x)
        ctx.x = node.add_user()
        ctx.save_for_backward(gate, *inputs)
        return x * gate

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, *inputs = ctx.saved_tensors
        overwrites = can_overwrite(gradient)
        grad_gate = (gradient * ctx.x.value(inputs)).sum_to_size(gate.shape)
        return gradient.mul_(gate) if overwrites else gradient * gate, grad_gate


def max_pool2d(x: Tensor, *options: Any) -> Tensor:  # Any, because `F.max_pool2d` has overloads
    """Return `F.max_pool2d(x, *options)`. Save x, but not the indices of the maxima.

    If x can be recomputed from other tensors, the function saves these tensors instead of x.
    """
    return _MaxPool.apply(x, options)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, options: tuple[Any, ...]) -> Tensor:
        node, inputs = get_recompute(x)
        ctx.x, ctx.options = node.add_user(), options
        ctx.save_for_backward(*inputs)
        return F.max_pool2d(x, *options)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.x.value(ctx.saved_tensors)
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.options)
        return torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *ctx.options, indices), None


def make_mask(x: Tensor, condition: Callable[[Tensor], Tensor], *, packed: bool) -> Tensor:
    """Return a uint8 mask of the elements of x that satisfy `condition`.

    The mask has one bit per element if `packed` is True, and one byte per element otherwise. It follows the memory
    order of x, which must be contiguous or channels-last. `condition` must map a one-dimensional part of x to booleans.
    """
    mask = torch.zeros(-(-x.numel() // 8) if packed else x.numel(), dtype=torch.uint8, device=x.device)
    for part, block, bit in _iter_parts(x, mask):
        block.add_(condition(part), alpha=bit)
    return mask


def mask_gradient(gradient: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Write `gradient` to `out`, with zeros at the elements that are not set in `mask`, and return `out`.

    `mask` is a result of `make_mask(x, ...)`. `gradient` and `out` must have the strides of x, and may be the same
    tensor.
    """
    is_packed = len(mask) < gradient.numel()
    for (part, block, bit), (result, _, _) in zip(_iter_parts(gradient, mask), _iter_parts(out, mask), strict=True):
        bits = block & bit if is_packed else block
        # A product with the mask would be NaN where the gradient is infinite and the mask is 0.
        torch.ops.aten.threshold_backward.grad_input(part, bits.to(gradient.dtype), 0, grad_input=result)
    return out


def _iter_parts(x: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield one-dimensional parts of x in memory order, each with its block of `mask` and the value of its bit.

    Byte i of the block contains the mask of element i of the part, so one elementwise operation can read or set the
    mask of a whole part. In a packed mask, eight parts share a block: each part uses one bit of every byte, with the
    value 1, 2, 4, ... or 128. In an unpacked mask, the value is always 1.
    """
    elements, start = x.as_strided((x.numel(),), (1,)), 0
    bits = range(8 if len(mask) < len(elements) else 1)
    for block in mask.split(CACHED_ELEMENTS if x.device.type == "cpu" else max(len(mask), 1)):
        for bit in bits:
            part = elements[start : start + len(block)]
            start += len(part)
            yield part, block[: len(part)], 1 << bit
