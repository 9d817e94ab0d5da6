"""Frozen batch normalisation, applied by the convolution before it.

Neither layer's weights change: the convolution scales its kernel on the fly, and marks its output as done; the norm
passes on what is marked. So whatever happens to either (another adapter, training, statistics estimated anew) shows in
the next forward pass, and what does not go from one to the other is normalised as ever.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class Slot(NamedTuple):
    """A place in a model, whose module changes when it is adapted."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> Any:
        """The module that stands there now."""
        return getattr(self.parent, self.name)


class FoldedNorm:
    """A convolution and the norm that takes its output, and nothing else does.

    A copy of one of the two layers alone has none, nor has a pickled one.

    Args:
        conv: the convolution's place.
        norm: the norm's.
    """

    def __init__(self, conv: Slot, norm: Slot) -> None:
        self.conv, self.norm = conv, norm

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedNorm | None:
        parents = memo.get(id(self.conv.parent)), memo.get(id(self.norm.parent))
        if parents[0] is None or parents[1] is None:
            return None
        return FoldedNorm(Slot(parents[0], self.conv.name), Slot(parents[1], self.norm.name))

    def __reduce__(self) -> Any:
        return _none, ()


def _none() -> None:
    return None


class Folding(NamedTuple):
    """What a convolution applies in the place of a norm."""

    scale: Tensor
    """(C_out,), the factor of each output channel."""

    shift: Tensor
    """(C_out,), the summand."""

    norm: nn.Module
    """Whose work it is."""

    def to(self, dtype: torch.dtype) -> Folding:
        """The same in another type."""
        return Folding(self.scale.to(dtype), self.shift.to(dtype), self.norm)

    def bias(self, bias: Tensor | None) -> Tensor:
        """The convolution's bias, scaled and shifted."""
        return self.shift if bias is None else bias * self.scale + self.shift

    def mark(self, y: Tensor) -> Tensor:
        """Says of the convolution's output that it is normalised."""
        y._normalised_by = self.norm, y._version  # type: ignore[attr-defined]
        return y


def folding(layer: nn.Module) -> Folding | None:
    """What a convolution applies in the place of the norm behind it; None while the norm does its own work.

    That is while the norm is trained or goes by the batch, while hooks look at what is between the two, in compiled
    models, where it is the compiler's affair, and for layers without a folded norm. The layer in the convolution's
    place says by `applies_folded_norm` whether it can, the one in the norm's by `frozen_affine` whether it is frozen.

    Args:
        layer: the convolution, or the adapted one around it.
    """
    pair = getattr(_base(layer), "folded_norm", None)
    if pair is None or torch.compiler.is_compiling():
        return None
    conv, norm = pair.conv.module, pair.norm.module
    if layer is not conv and layer is not _base(conv):
        return None
    if any(map(_is_observed, (conv, _base(conv), norm, _base(norm)))):
        return None
    if not getattr(conv, "applies_folded_norm", False) or not hasattr(norm, "frozen_affine"):
        return None
    affine = norm.frozen_affine()
    return None if affine is None else Folding(affine[0], affine[1], norm)


def takes_folded(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm's input has gone through it already; asked once.

    Args:
        norm: the layer in the norm's place.
        x: its input.

    Raises:
        RuntimeError: if that was changed since, or another norm's statistics were applied.
    """
    done_by, version = getattr(x, "_normalised_by", (None, None))
    if done_by is None:
        return False
    if done_by is not norm or version != x._version:
        raise RuntimeError(
            "a folded BatchNorm was applied to a convolution's output that was then changed, or given to another "
            "layer: call prepare_model_for_lean_training again now that the model is another, or without fold_norm"
        )
    x._normalised_by = None, None  # type: ignore[attr-defined]
    return True


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _is_observed(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # What a wrapper answers is what the layer inside answers, which may not be the one that runs.
    return any(hooks) or "forward" in vars(layer) or isinstance(layer, AuxiliaryTrainingWrapper)
