"""Activations and gates that save fewer bytes for the backward pass than torch's functions.

- A clipped activation `min(max(x, 0), upper)`, such as ReLU or ReLU6, has the slope 0 or 1. The function
  `clipped_activation` saves the slopes as a mask of one byte or one bit per element. If the next layer saves the output
  anyway, `clipped_activation` saves the same tensor instead of a mask.
- `smooth_activation`, for example for SiLU, saves its input. Later functions recompute the output from this input.
- `gated_product` multiplies a feature map `x` by a `gate` per channel, as squeeze-excite does. The function saves
  `gate` and `x`. If `x` can be recomputed, the function saves the inputs of the recomputation instead of `x`.
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

    If the output is neither contiguous nor channels-last, `keep` is ignored and the output is saved. `forward` must
    compute the activation; `upper` is infinity for ReLU. With `inplace`, `forward` must overwrite and return its
    argument. This argument is x or a one-dimensional part of x.
    """
    recompute = get_recompute(x)
    y = _ClippedActivation.apply(x, forward, upper, keep, inplace)
    return y if recompute.is_identity else set_recompute(y, recompute.then(forward))


class _ClippedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, forward: Activation, upper: float, keep: Kept, inplace: bool
    ) -> Tensor:
        # With `inplace`, `make_mask` activates x part by part, and computes each mask while the part is in the cache.
        activates_parts = inplace and keep != "output" and has_standard_layout(x)
        y = x if activates_parts else forward(x)
        if inplace:
            ctx.mark_dirty(x)

        def has_slope_one(part: Tensor) -> Tensor:
            y = forward(part) if activates_parts else part
            # `_clip_gradient(y, y, ...)` is nonzero where 0 < y < upper. Comparison operators are far slower on a CPU.
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
                # Autograd will differentiate this backward pass, but `mask_gradient` has no derivative.
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
    """Return `forward(x)`. Save x or, if x can be recomputed, the inputs of its recomputation.

    `forward` must not overwrite x. `backward` must map the gradient of the output and x to the gradient of x.
    """
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
            # Autograd will differentiate this backward pass, but most of torch's backward operators have no derivative.
            return *torch.autograd.grad(ctx.forward_of_x(x), x, gradient, create_graph=True), None, None
        return ctx.backward_of_x(gradient, x), None, None


def gated_product(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * gate, for x of shape (B, C, *size) and `gate` of shape (B, C, 1, ...).

    The function saves `gate` and x. If x can be recomputed, the function saves the inputs of the recomputation
    instead of x.
    """
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

    x must be contiguous or channels-last. The mask follows the memory order of x. `condition` must map a
    one-dimensional part of x to booleans.
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
    """Yield 1-D parts of x in memory order, each with its bytes of `mask` and the value that selects its bit.

    Adjacent elements of a part use the same bit of adjacent bytes, so one operation reads or sets the bits of a part.
    """
    elements, start = x.as_strided((x.numel(),), (1,)), 0
    bits = range(8 if len(mask) < len(elements) else 1)
    for block in mask.split(_CACHED_ELEMENTS if x.device.type == "cpu" else max(len(mask), 1)):
        for bit in bits:
            part = elements[start : start + len(block)]
            start += len(part)
            yield part, block[: len(part)], 1 << bit
