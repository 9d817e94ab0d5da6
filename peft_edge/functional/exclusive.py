"""Whether a gradient may be overwritten.

Autograd may hand one tensor to several branches, so a backward must not change what it is given. Where nobody else
holds the tensor, overwriting it saves a buffer of its size, and on a CPU most of the time of an elementwise operation,
which goes into the first touch of fresh memory.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch


def is_exclusive(gradient: Tensor) -> bool:
    """Whether the caller, the `backward(ctx, gradient)` of an autograd function, is all that holds the gradient.

    Every holder shows in one of three counts: references to the Python object, to the tensor behind it, and to the
    storage. What the counts are without another holder is measured once, in a backward pass where there is none.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _holders(gradient) == _without_others()


def _holders(gradient: Any) -> tuple[int, int, int]:
    # Of any type, since not every version of torch declares its counts.
    storage = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return sys.getrefcount(gradient), gradient._use_count(), storage


class _Probe(torch.autograd.Function):
    found: tuple[int, int, int]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Probe.found = _probe(gradient)
        return gradient


def _probe(gradient: Tensor) -> tuple[int, int, int]:
    # As deep in calls as `is_exclusive`, since each call is a reference.
    return _holders(gradient)


@functools.cache
def _without_others() -> tuple[int, int, int]:
    # Not at import, which would start autograd's threads; and hidden from counters that are at work.
    with no_dispatch(), torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        _Probe.apply(x).square().sum().backward()
    return _Probe.found
