"""Tensors that are made anew in the backward pass, from others that are kept there anyway.

The output of a smooth activation follows from its input, which the activation keeps: who needs the output in a backward
pass of its own keeps the recipe instead, which costs no memory, and an elementwise operation later.

Whether a gradient may be overwritten.

Autograd may hand one tensor to several branches, so a backward must not change what it is given. Where nobody else
holds the tensor, overwriting it saves a buffer of its size, and on a CPU most of the time of an elementwise operation,
which goes into the first touch of fresh memory.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

_DEVICES = ("cpu", "cuda")


class Recompute(NamedTuple):
    """How to make a tensor."""

    make: Callable[..., Tensor]
    """From the ingredients to the tensor, bit for bit."""

    ingredients: tuple[Tensor, ...]
    """What is kept, by somebody else too."""

    num_convolutions: int = 0
    """What it costs; the rest is elementwise."""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is its own ingredient."""
        return self.make is _itself

    def then(self, function: Callable[[Tensor], Tensor], *, num_convolutions: int = 0) -> Recompute:
        """How to make what a function makes of the tensor."""
        types = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}

        def make(*ingredients: Tensor) -> Tensor:
            with ExitStack() as surroundings:
                # The backward pass runs outside of autocast.
                for device, dtype in types.items():
                    surroundings.enter_context(torch.autocast(device, dtype))
                return function(self.make(*ingredients))

        return Recompute(make, self.ingredients, self.num_convolutions + num_convolutions)


def set_recompute(tensor: Tensor, recipe: Recompute) -> Tensor:
    """Notes on a tensor how to make it, for `get_recompute`, and returns it."""
    if not torch.compiler.is_compiling():
        tensor._recipe = recipe, tensor._version  # type: ignore[attr-defined]
    return tensor


def get_recompute(tensor: Tensor) -> Recompute:
    """How to make a tensor: as `set_recompute` noted it, unless it was changed in place since; else from itself."""
    if not torch.compiler.is_compiling():
        recipe, version = getattr(tensor, "_recipe", (None, None))
        if recipe is not None and version == tensor._version:
            return recipe
    return identity_recompute(tensor)


def identity_recompute(tensor: Tensor) -> Recompute:
    """The recipe that is the tensor."""
    return Recompute(_itself, (tensor,))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def can_overwrite(gradient: Tensor) -> bool:
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
    # As deep in calls as `can_overwrite`, since each call is a reference.
    return _holders(gradient)


@functools.cache
def _without_others() -> tuple[int, int, int]:
    # Not at import, which would start autograd's threads; and hidden from counters that are at work.
    with no_dispatch(), torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        _Probe.apply(x).square().sum().backward()
    return _Probe.found
