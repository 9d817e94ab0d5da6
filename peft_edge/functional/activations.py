"""Activations whose backward keeps as little as it needs.

The slope of a clipped line, such as ReLU's, is zero or one, and the output tells which: a byte or a bit for each
element is enough, where the element takes four bytes. A smooth activation needs its input, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from peft_edge.functional.exclusive import is_exclusive
from peft_edge.functional.masks import is_dense, make_mask, mask_gradient
from peft_edge.functional.recipes import attach, recipe_of

Kept = Literal["output", "byte", "bit"]


def clipped_activation(
    x: Tensor, forward: Callable[[Tensor], Tensor], *, upper: float, keep: Kept, inplace: bool = False
) -> Tensor:
    """An activation min(max(x, 0), upper).

    Args:
        x: of any shape.
        forward: the activation, from x or some elements of it to their output.
        upper: the largest output, possibly infinite.
        keep: what the backward keeps: the output, which costs nothing where the next layer keeps it too, or a byte or
            a bit for each element.
        inplace: whether `forward` changes what it is given, and returns that.
    """
    recipe = recipe_of(x)
    y = _ClippedActivation.apply(x, forward, upper, keep, inplace)
    return y if recipe.is_plain else attach(y, recipe.then(forward))


def smooth_activation(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
    """An activation that keeps its input, or what that can be made from.

    Args:
        x: of any shape; never overwritten.
        forward: from x to the output.
        backward: from the gradient of the output and x to the gradient of x.
    """
    return attach(_SmoothActivation.apply(x, forward, backward), recipe_of(x).then(forward))


class _ClippedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], upper: float, keep: Kept, inplace: bool
    ) -> Tensor:
        # In place, a part is masked as soon as it is made, while it is in the cache.
        in_parts = inplace and keep != "output" and is_dense(x)
        y = x if in_parts else forward(x)
        if inplace:
            ctx.mark_dirty(x)

        def is_on_line(part: Tensor) -> Tensor:
            return _is_on_line(forward(part) if in_parts else part, upper)

        ctx.keep = keep if is_dense(y) else "output"
        ctx.upper, ctx.stride = upper, y.stride()
        ctx.save_for_backward(y if ctx.keep == "output" else make_mask(y, is_on_line, packed=keep == "bit"))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        is_ours = is_exclusive(gradient)
        if ctx.keep == "output":
            gradient = _through_line(gradient, kept, ctx.upper, out=gradient if is_ours else None)
        else:
            if gradient.stride() != ctx.stride:
                ours = torch.empty_strided(gradient.size(), ctx.stride, dtype=gradient.dtype, device=gradient.device)
                gradient, is_ours = ours.copy_(gradient), True
            gradient = _MaskedGradient.apply(gradient, kept, is_ours)
        return gradient, None, None, None, None


class _MaskedGradient(torch.autograd.Function):
    """The gradient where the mask is set, for a backward that is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, mask: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(mask)
        if inplace:
            ctx.mark_dirty(gradient)
        return mask_gradient(gradient, mask, out=gradient if inplace else torch.empty_like(gradient))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _MaskedGradient.apply(gradient, mask, False), None, None


class _SmoothActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.forward_of_x, ctx.backward_of_x = forward, backward
        ctx.make_x, ingredients, _ = recipe_of(x)
        ctx.save_for_backward(*ingredients)
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.make_x(*ctx.saved_tensors)
        if torch.is_grad_enabled():
            # torch has no derivative of most of its backward operators.
            return *torch.autograd.grad(ctx.forward_of_x(x), x, gradient, create_graph=True), None, None
        return ctx.backward_of_x(gradient, x), None, None


def _is_on_line(y: Tensor, upper: float) -> Tensor:
    # As its own gradient an output becomes zero at the ends; a comparison is several times slower on a CPU.
    return (y if upper == float("inf") else _through_line(y, y, upper, out=None)).bool()


def _through_line(gradient: Tensor, y: Tensor, upper: float, out: Tensor | None) -> Tensor:
    is_open = upper == float("inf")
    backward = torch.ops.aten.threshold_backward if is_open else torch.ops.aten.hardtanh_backward
    bounds = (0,) if is_open else (0, upper)
    return backward(gradient, y, *bounds) if out is None else backward.grad_input(gradient, y, *bounds, grad_input=out)
