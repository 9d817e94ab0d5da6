"""Masks of a byte or a bit for each element of a tensor, in the order of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Eight bytes of zeros and ones, read as one integer and multiplied by the first number, have their bits side by side in
# the highest byte. A byte that the second number repeats and the third filters has each of its bits in a byte.
_GATHER, _REPEAT, _FILTER = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)
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
        is_set: from some elements to a boolean for each.
        packed: a bit for each element, instead of a byte.
    """
    mask = torch.empty(-(-x.numel() // 8) if packed else x.numel(), dtype=torch.uint8, device=x.device)
    for elements, part in _parts(x, mask):
        part.copy_(_pack(is_set(elements)) if packed else is_set(elements))
    return mask


def mask_gradient(gradient: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Writes the gradient to `out`, with zeros where the mask is not set.

    Args:
        gradient: with the strides that the masked tensor had.
        mask: from `make_mask`.
        out: with the same strides; may be the gradient itself.
    """
    for (elements, part), (result, _) in zip(_parts(gradient, mask), _parts(out, mask), strict=True):
        bits = part if len(mask) == gradient.numel() else _unpack(part)[: len(elements)]
        # Where there is nothing to pass the result is zero, even for an infinite gradient: so no product.
        torch.ops.aten.threshold_backward.grad_input(elements, bits.to(gradient.dtype), 0, grad_input=result)
    return out


def _parts(x: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some elements of x at a time, with their part of the mask."""
    size = _CACHED_ELEMENTS if x.device.type == "cpu" else max(x.numel() + 7, 8)
    elements = x.as_strided((x.numel(),), (1,)).split(size)
    return zip(elements, mask.split(size if len(mask) == x.numel() else size // 8), strict=True)


def _pack(bits: Tensor) -> Tensor:
    missing = -len(bits) % 8
    if missing:
        bits = torch.cat([bits, bits.new_zeros(missing)])
    return (bits.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def _unpack(mask: Tensor) -> Tensor:
    """Eight bytes for each byte, which are zero where its bits are."""
    return (mask.to(torch.int64) * _REPEAT).bitwise_and_(_FILTER).view(torch.uint8)
