"""Activations and gates that save fewer bytes for the backward pass than those of torch.

- A clipped activation `min(max(x, 0), upper)`, such as ReLU or ReLU6, has the slope 0 or 1. It saves a mask of one byte
  or one bit per element. If the next layer saves the output anyway, the activation saves the same output instead.
- A smooth activation, such as SiLU, saves its input. Later functions recompute its output from this input.
- The product of a map `x` and a `gate` per channel, as in squeeze-excite, saves the gate, and the map or the inputs to
  recompute the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from peft_edge._compat import AutogradContext
from peft_edge.functional.convolution import memory_format_of
from peft_edge.functional.recompute import Recompute, can_overwrite, get_recompute, set_recompute

Activation = Callable[[Tensor], Tensor]
Derivative = Callable[[Tensor, Tensor], Tensor]
"""Maps the output gradient dY and the input x to the input gradient dX."""

Kept = Literal["output", "byte", "bit"]
"""What a clipped activation saves: its output, or a mask of one byte or one bit per element."""

# On a CPU, a mask is computed for at most this many elements at once, so that temporaries stay in the cache.
_CACHED_ELEMENTS = 1 << 19


def clipped_activation(x: Tensor, forward: Activation, *, upper: float, keep: Kept, inplace: bool = False) -> Tensor:
    """Return `min(max(x, 0), upper)`, and save the output or a mask (`keep`) for the backward pass.

    A tensor without standard layout has no mask: its output is saved. `forward` must compute the activation; `upper` is
    infinity for ReLU. With `inplace`, `forward` must overwrite and return its argument, which is x or a flat part of x.
    """
    recompute = get_recompute(x)
    y = _ClippedActivation.apply(x, forward, upper, keep, inplace)
    return y if recompute.is_identity else set_recompute(y, recompute.then(forward))


class _ClippedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, forward: Activation, upper: float, keep: Kept, inplace: bool
    ) -> Tensor:
        # In place, activate a part of x and compute the mask of this part while the part is in the cache.
        activates_parts = inplace and keep != "output" and has_standard_layout(x)
        y = x if activates_parts else forward(x)
        if inplace:
            ctx.mark_dirty(x)

        def has_slope_one(part: Tensor) -> Tensor:
            y = forward(part) if activates_parts else part
            # `_clip_gradient(y, y, ...)` is nonzero only between the bounds. Comparisons are far slower on a CPU.
            return (y if upper == float("inf") else _clip_gradient(y, y, upper, out=None)).bool()

        ctx.keep = keep if has_standard_layout(y) else "output"
        ctx.upper, ctx.stride = upper, y.stride()
        ctx.save_for_backward(y if ctx.keep == "output" else make_mask(y, has_slope_one, packed=keep == "bit"))
        return y

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        overwrites = can_overwrite(gradient)
        if ctx.keep == "output":
            gradient = _clip_gradient(gradient, saved, ctx.upper, out=gradient if overwrites else None)
        else:
            if gradient.stride() != ctx.stride:
                copied = torch.empty_strided(gradient.size(), ctx.stride, dtype=gradient.dtype, device=gradient.device)
                gradient, overwrites = copied.copy_(gradient), True
            if torch.is_grad_enabled():
                # `mask_gradient` has no derivative, which a second derivative would need.
                is_set = mask_gradient(torch.ones_like(gradient), saved, out=torch.empty_like(gradient)).bool()
                gradient = torch.where(is_set, gradient, torch.zeros_like(gradient))
            else:
                out = gradient if overwrites else torch.empty_like(gradient)
                gradient = mask_gradient(gradient, saved, out=out)
        return gradient, None, None, None, None


def _clip_gradient(gradient: Tensor, y: Tensor, upper: float, out: Tensor | None) -> Tensor:
    """Return `gradient` where 0 < y < upper and 0 elsewhere, in the tensor `out` unless it is None."""
    is_unbounded = upper == float("inf")
    operator = torch.ops.aten.threshold_backward if is_unbounded else torch.ops.aten.hardtanh_backward
    bounds = (0,) if is_unbounded else (0, upper)
    return operator(gradient, y, *bounds) if out is None else operator.grad_input(gradient, y, *bounds, grad_input=out)


def smooth_activation(x: Tensor, forward: Activation, backward: Derivative) -> Tensor:
    """Return `forward(x)`, and save x or the inputs from which to recompute x. `forward` must not overwrite x."""
    return set_recompute(_SmoothActivation.apply(x, forward, backward), get_recompute(x).then(forward))


class _SmoothActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, forward: Activation, backward: Derivative) -> Tensor:
        ctx.forward_of_x, ctx.backward_of_x = forward, backward
        ctx.recompute_x, inputs, _ = get_recompute(x)
        ctx.save_for_backward(*inputs)
        return forward(x)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.recompute_x(*ctx.saved_tensors)
        if torch.is_grad_enabled():
            # Most of torch's backward operators have no derivative, which a second derivative would need.
            return *torch.autograd.grad(ctx.forward_of_x(x), x, gradient, create_graph=True), None, None
        return ctx.backward_of_x(gradient, x), None, None


def gated_product(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * gate, (B, C, *size) * (B, C, 1, ...). Saves the gate, and x or, if x can be recomputed, the inputs that x is recomputed from."""
    recompute_x, inputs, num_convolutions = get_recompute(x)

    def recompute(gate: Tensor, *inputs: Tensor) -> Tensor:
        return recompute_x(*inputs) * gate

    return set_recompute(_GatedProduct.apply(x, gate), Recompute(recompute, (gate, *inputs), num_convolutions))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, gate: Tensor) -> Tensor:
        ctx.recompute_x, inputs, _ = get_recompute(x)
        ctx.save_for_backward(gate, *inputs)
        return x * gate

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, *inputs = ctx.saved_tensors
        overwrites = can_overwrite(gradient)
        grad_gate = (gradient * ctx.recompute_x(*inputs)).sum_to_size(gate.shape)
        return gradient.mul_(gate) if overwrites else gradient * gate, grad_gate


def has_standard_layout(x: Tensor) -> bool:
    """Return whether a tensor is contiguous or channels-last, without gaps between its elements."""
    return x.is_contiguous(memory_format=memory_format_of(x))


def make_mask(x: Tensor, condition: Callable[[Tensor], Tensor], *, packed: bool) -> Tensor:
    """Return a uint8 mask of the elements of x that satisfy `condition`: one bit (`packed`) or one byte per element.

    x must be contiguous or channels_last. The mask follows the memory order of x. `condition` must map a one-dimensional
    part of x to booleans.
    """
    mask = torch.zeros(-(-x.numel() // 8) if packed else x.numel(), dtype=torch.uint8, device=x.device)
    for part, block, bit in _iter_parts(x, mask):
        block.add_(condition(part), alpha=bit)
    return mask


def mask_gradient(gradient: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Write `gradient` to `out`, with zeros for elements that are not set in `mask`, and return `out`.

    `mask` is a result of `make_mask(x, ...)`. `gradient` and `out` must have the strides of x, and may be one tensor.
    """
    is_packed = len(mask) < gradient.numel()
    for (part, block, bit), (result, _, _) in zip(_iter_parts(gradient, mask), _iter_parts(out, mask), strict=True):
        bits = block & bit if is_packed else block
        # A product with the mask would be NaN where the gradient is infinite and the mask is 0.
        torch.ops.aten.threshold_backward.grad_input(part, bits.to(gradient.dtype), 0, grad_input=result)
    return out


def _iter_parts(x: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield each flat part of x, the bytes of `mask` for this part, and the value of the bit (1 if not packed).

    Adjacent elements of a part use the same bit of adjacent bytes, so one operation reads or sets all bits of the part.
    """
    elements, start = x.as_strided((x.numel(),), (1,)), 0
    bits = range(8 if len(mask) < len(elements) else 1)
    for block in mask.split(_CACHED_ELEMENTS if x.device.type == "cpu" else max(len(mask), 1)):
        for bit in bits:
            part = elements[start : start + len(block)]
            start += len(part)
            yield part, block[: len(part)], 1 << bit
