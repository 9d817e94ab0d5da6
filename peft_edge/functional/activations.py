"""Masks of a byte or a bit for each element of a tensor, in the order of its memory.

Activations whose backward keeps as little as it needs.

The slope of a clipped line, such as ReLU's, is zero or one, and the output tells which: a byte or a bit for each
element is enough, where the element takes four bytes. A smooth activation needs its input, and nothing else.

The product of a map and a gate for each of its channels, as squeeze-excite has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from peft_edge.functional.recompute import Recompute, can_overwrite, get_recompute, set_recompute

# Elements at a time on a CPU, so that what is in between stays in its cache.
_CACHED_ELEMENTS = 1 << 19


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie side by side, in one of torch's memory formats."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])]
    return any(x.is_contiguous(memory_format=memory_format) for memory_format in formats)


def make_mask(x: Tensor, is_set: Callable[[Tensor], Tensor], *, packed: bool) -> Tensor:
    """The mask of the elements of a dense tensor that `is_set` says, of type uint8, as `mask_gradient` takes it.

    Args:
        x: dense, of any shape.
        is_set: from some elements, a view of one dimension, to a boolean for each.
        packed: a bit for each element, instead of a byte.
    """
    mask = torch.zeros(-(-x.numel() // 8) if packed else x.numel(), dtype=torch.uint8, device=x.device)
    for elements, block, bit in _parts(x, mask):
        block.add_(is_set(elements), alpha=bit)
    return mask


def mask_gradient(gradient: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Writes the gradient to `out`, with zeros where the mask is not set.

    Args:
        gradient: with the strides that the masked tensor had.
        mask: from `make_mask`.
        out: with the same strides; may be the gradient itself.
    """
    packed = len(mask) < gradient.numel()
    for (elements, block, bit), (result, _, _) in zip(_parts(gradient, mask), _parts(out, mask), strict=True):
        bits = block & bit if packed else block
        # Where there is nothing to pass the result is zero, even for an infinite gradient: so no product.
        torch.ops.aten.threshold_backward.grad_input(elements, bits.to(gradient.dtype), 0, grad_input=result)
    return out


def _parts(x: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Some elements of x at a time, with their bytes of the mask and, as a number, their bit of each.

    Neighbours have the same bit of neighbouring bytes, so that all bits of a part are set or read by one operation.
    """
    elements, start = x.as_strided((x.numel(),), (1,)), 0
    bits = range(8 if len(mask) < len(elements) else 1)
    for block in mask.split(_CACHED_ELEMENTS if x.device.type == "cpu" else max(len(mask), 1)):
        for bit in bits:
            part = elements[start : start + len(block)]
            start += len(part)
            yield part, block[: len(part)], 1 << bit


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
    recipe = get_recompute(x)
    y = _ClippedActivation.apply(x, forward, upper, keep, inplace)
    return y if recipe.is_plain else set_recompute(y, recipe.then(forward))


def smooth_activation(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
    """An activation that keeps its input, or what that can be made from.

    Args:
        x: of any shape; never overwritten.
        forward: from x to the output.
        backward: from the gradient of the output and x to the gradient of x.
    """
    return set_recompute(_SmoothActivation.apply(x, forward, backward), get_recompute(x).then(forward))


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
        is_ours = can_overwrite(gradient)
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
        ctx.make_x, ingredients, _ = get_recompute(x)
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


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """The product x * gate, keeping of x what it can be made from.

    Args:
        x: (B, C, *size).
        gate: (B, C, 1, ...).
    """
    y = _Gated.apply(x, gate)
    recipe = get_recompute(x)
    ingredients = (gate, *recipe.ingredients)
    return set_recompute(
        y, Recompute(lambda gate, *kept: recipe.make(*kept) * gate, ingredients, recipe.num_convolutions)
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.make, ingredients, _ = get_recompute(x)
        ctx.save_for_backward(gate, *ingredients)
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, *ingredients = ctx.saved_tensors
        is_ours = can_overwrite(gradient)
        gradient_of_gate = (gradient * ctx.make(*ingredients)).sum_to_size(gate.shape)
        return gradient.mul_(gate) if is_ours else gradient * gate, gradient_of_gate
