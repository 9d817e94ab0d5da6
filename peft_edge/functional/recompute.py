"""Save memory in backward passes: recompute tensors, and overwrite gradients.

- **Recompute.** A smooth activation saves its input. Another function that needs the output of the activation saves the
  same input and recomputes the output. This costs one elementwise operation, but no additional memory. `set_recompute`
  stores a `Recompute` on a tensor, and `get_recompute` reads it.
- **Overwrite.** Autograd may pass one gradient to several functions, so a backward pass must normally not change a
  gradient in place. If no other function holds the gradient (`can_overwrite`), overwriting the gradient saves a buffer.
  On a CPU, an elementwise operation in place also takes far less time, because new memory causes page faults.
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
    """A function and the inputs from which it recomputes a tensor."""

    function: Callable[..., Tensor]
    """Maps `inputs` to the tensor, bit-identical to the original."""
    inputs: tuple[Tensor, ...]
    """Tensors that another autograd function saves anyway."""
    num_convolutions: int = 0
    """The number of convolutions that `function` runs. All other operations are elementwise."""

    @property
    def is_identity(self) -> bool:
        """Whether `inputs` contains only the tensor itself, so that recomputing the tensor saves nothing."""
        return self.function is _identity

    def then(self, function: Callable[[Tensor], Tensor], *, num_convolutions: int = 0) -> Recompute:
        """Return a `Recompute` that recomputes the tensor and then applies `function` to the tensor.

        `num_convolutions` is the number of convolutions that `function` runs.
        """
        # Backward passes run without autocast, so restore the autocast settings of the forward pass.
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
    """Store `recompute` on a tensor, unless a compiler is tracing, and return the tensor."""
    if not torch.compiler.is_compiling():
        tensor._recompute = recompute, version_of(tensor)  # type: ignore[attr-defined]
    return tensor


def get_recompute(tensor: Tensor) -> Recompute:
    """Return the `Recompute` that `set_recompute` stored on a tensor.

    Return the identity if nothing is stored, if the tensor was changed in place, or if a compiler is tracing.
    """
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
    """Return whether only the caller holds the gradient; False if a compiler is tracing or gradients are enabled.

    The caller must be the `backward` of an autograd function. Any other holder of the gradient increases one of three
    counts: references to the Python object, to the C++ tensor, or to the storage. The function compares these counts
    with the counts in a backward pass without another holder.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return _reference_counts(gradient) == _counts_of_sole_holder()


def _reference_counts(gradient: Tensor) -> tuple[int, int, int]:
    return sys.getrefcount(gradient), *use_counts(gradient)


@functools.cache
def _counts_of_sole_holder() -> tuple[int, int, int]:
    # Do not run this at import: a backward pass starts threads. `no_dispatch` hides the pass from FLOP and memory
    # counters.
    with no_dispatch(), torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        _Probe.apply(x).square().sum().backward()
    return _Probe.counts


class _Probe(torch.autograd.Function):
    """Copies its input. The backward pass records the reference counts of a gradient without another holder."""

    counts: tuple[int, int, int]

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> Tensor:
        _Probe.counts = _probe(gradient)
        return gradient


def _probe(gradient: Tensor) -> tuple[int, int, int]:
    # Each call holds a reference to its argument. This call adds the same reference as a call of `can_overwrite`.
    return _reference_counts(gradient)
