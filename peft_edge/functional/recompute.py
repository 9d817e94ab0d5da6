"""Save memory in backward passes: recompute tensors, and overwrite gradients.

The autograd functions of this package share two techniques:

- **Recompute.** The output of a smooth activation follows from its input, which the activation saves. A function that
  needs the output in its own backward pass saves the same input and recomputes the output: one elementwise operation
  more, and no memory. `set_recompute` notes on a tensor how to recompute it, `get_recompute` reads the note.
- **Overwrite.** Autograd may pass one gradient to several functions, so a backward pass must not change the gradient it
  receives. If no other function holds the gradient, overwriting it saves a buffer. On a CPU that also saves most of the
  time of an elementwise operation, which goes into page faults of new memory. `can_overwrite` checks this.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from peft_edge._compat import AutogradContext, no_dispatch, use_counts, version_of


class Recompute(NamedTuple):
    """A function, and the inputs from which it recomputes a tensor."""

    function: Callable[..., Tensor]
    """Maps `inputs` to the tensor, bit-identical to the original."""

    inputs: tuple[Tensor, ...]
    """Tensors that another autograd function saves anyway."""

    num_convolutions: int = 0
    """The number of convolutions that `function` runs. Its other operations are elementwise."""

    @property
    def is_identity(self) -> bool:
        """Whether the tensor is its own input, so that recomputing it saves nothing."""
        return self.function is _identity

    def then(self, function: Callable[[Tensor], Tensor], *, num_convolutions: int = 0) -> Recompute:
        """Return the recomputation that applies `function`, with `num_convolutions`, to the recomputed tensor."""
        # A backward pass runs without autocast, so the settings of the forward pass are restored.
        dtypes = {
            device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        }

        def recompute(*inputs: Tensor) -> Tensor:
            with ExitStack() as stack:
                for device, dtype in dtypes.items():
                    stack.enter_context(torch.autocast(device, dtype))
                return function(self.function(*inputs))

        return Recompute(recompute, self.inputs, self.num_convolutions + num_convolutions)


def set_recompute(tensor: Tensor, recompute: Recompute) -> Tensor:
    """Note on a tensor how to recompute it, and return the tensor."""
    if not torch.compiler.is_compiling():
        tensor._recompute = recompute, version_of(tensor)  # type: ignore[attr-defined]
    return tensor


def get_recompute(tensor: Tensor) -> Recompute:
    """Return what `set_recompute` noted on a tensor, or the identity if the tensor has changed in place since."""
    if not torch.compiler.is_compiling():
        recompute, version = getattr(tensor, "_recompute", (None, None))
        if recompute is not None and version == version_of(tensor):
            return recompute
    return identity_recompute(tensor)


def identity_recompute(tensor: Tensor) -> Recompute:
    """Return the recomputation whose only input is the tensor itself."""
    return Recompute(_identity, (tensor,))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def can_overwrite(gradient: Tensor) -> bool:
    """Return whether only the caller, the `backward(ctx, gradient)` of an autograd function, holds the gradient.

    Any other holder raises one of three counts: references to the Python object, to the C++ tensor, or to the storage.
    The counts without another holder are measured once, in a backward pass that has none.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _reference_counts(gradient) == _counts_of_sole_holder()


def _reference_counts(gradient: Tensor) -> tuple[int, int, int]:
    return sys.getrefcount(gradient), *use_counts(gradient)


@functools.cache
def _counts_of_sole_holder() -> tuple[int, int, int]:
    # Not at import, because it starts autograd's threads. `no_dispatch` hides it from active FLOP and memory counters.
    with no_dispatch(), torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        _Probe.apply(x).square().sum().backward()
    return _Probe.counts


class _Probe(torch.autograd.Function):
    """The identity; its backward pass records the reference counts of a gradient without another holder."""

    counts: tuple[int, int, int]

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> Tensor:
        _Probe.counts = _probe(gradient)
        return gradient


def _probe(gradient: Tensor) -> tuple[int, int, int]:
    # Each call holds a reference: this function makes the probe as many calls deep as `can_overwrite`.
    return _reference_counts(gradient)
