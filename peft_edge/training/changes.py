"""What an update has done to each kernel: how much it has moved, and in how many directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_edge.records import KernelChange
from peft_edge.roles import named_convolutions

_KINDS = ("depthwise", "pointwise", "dense")


@torch.no_grad()
def kernel_changes(source: nn.Module, updated: nn.Module) -> dict[str, KernelChange]:
    """Compares the convolutions of two models.

    A kernel (C_out, C_in/g, *kernel) is read as a matrix (C_out, K), as the adapters read it.

    Args:
        source: The model from before.
        updated: The same with its update merged.

    Returns:
        The change of each convolution that has changed, by its name.
    """
    before = {name: conv.weight for name, conv, _ in named_convolutions(source)}
    changes = {}
    for name, conv, roles in named_convolutions(updated):
        old = before[name].double().flatten(1)
        change = conv.weight.to(old).flatten(1) - old
        if change.any():
            changes[name] = KernelChange(
                kind=next((kind for kind in _KINDS if kind in roles), "grouped"),
                relative_norm=_rounded(change.norm() / old.norm()),
                stable_rank=_rounded(_stable_rank(change)),
            )
    return changes


def _stable_rank(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The squares of the singular values, from the smaller of the two products.
    squares = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.sum() / squares[-1]


def _rounded(value: Tensor) -> float:
    """To four digits: every run's record has them for every layer."""
    return float(f"{value.item():.4g}")
