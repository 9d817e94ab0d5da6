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


def base_layer(layer: Any) -> Any:
    """The layer that PEFT has adapted, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


class Slot:
    """A place in a model, whose module changes when it is adapted.

    It goes along with a copy of the model. A copy of a part, or a pickled one, has nothing in its places.

    Args:
        root: the model.
        path: the place's name in it.
    """

    def __init__(self, root: nn.Module | None, path: str) -> None:
        self._root, self._path = root, path

    @property
    def module(self) -> Any:
        """The module that stands there now, or None."""
        try:
            return None if self._root is None else self._root.get_submodule(self._path)
        except AttributeError:
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(memo.get(id(self._root)), self._path)

    def __reduce__(self) -> Any:
        return Slot, (None, self._path)


class FoldedNorm(NamedTuple):
    """A convolution and the norm that takes its output, and nothing else does."""

    conv: Slot
    norm: Slot


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
    pair = getattr(base_layer(layer), "folded_norm", None)
    if pair is None or torch.compiler.is_compiling():
        return None
    conv, norm = pair.conv.module, pair.norm.module
    if layer is not conv and layer is not base_layer(conv):
        return None
    if any(map(_is_observed, (conv, base_layer(conv), norm, base_layer(norm)))):
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


def _is_observed(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # What a wrapper answers is what the layer inside answers, which may not be the one that runs.
    return any(hooks) or "forward" in vars(layer) or isinstance(layer, AuxiliaryTrainingWrapper)
