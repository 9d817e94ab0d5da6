"""Frozen batch normalisation, applied by the convolution before it.

Neither layer's weights change: the convolution scales its kernel on the fly, and the norm passes on what it is given.
So whatever happens to either (another adapter, training, statistics estimated anew) shows in the next forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Slot(NamedTuple):
    """A place in a model, whose module changes when it is adapted."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> Any:
        """The module that stands there now."""
        return getattr(self.parent, self.name)


class FoldedNorm(NamedTuple):
    """A convolution, and the norm that it applies while both allow it."""

    conv: Slot
    norm: Slot

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """The factor and the summand of every output channel, (C,) each; None while the norm does its own work.

        The convolution says by `applies_folded_norm` whether it can, the norm by `frozen_affine` whether it is frozen.
        """
        if not getattr(self.conv.module, "applies_folded_norm", False):
            return None
        frozen_affine = getattr(self.norm.module, "frozen_affine", None)
        return None if frozen_affine is None else frozen_affine()


def folded_affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What the convolution of a folded norm applies; None for layers without one."""
    folded = getattr(layer, "folded_norm", None)
    return None if folded is None else folded.affine()
