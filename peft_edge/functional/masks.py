"""Masks of a byte or a bit for each element of a tensor, in the order of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
