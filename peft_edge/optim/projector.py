"""The low-rank subspace that GaLore (Zhao et al. 2024, arXiv 2403.03507) projects the gradient of a matrix into."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PROJ_TYPES: dict[str, str] = {
    "std": "the smaller side of the matrix is projected, its columns if it is square",
    "reverse_std": "the larger side, the rows if it is square",
    "right": "the columns",
    "left": "the rows",
    "full": "both",
}

_LARGEST_EXACT_SIDE = 256
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


class Basis(NamedTuple):
    """Orthonormal vectors that span the subspace."""

    left: Tensor | None = None
    """(rows, r), None where the rows stay as they are."""
    right: Tensor | None = None
    """(r, columns), None where the columns do."""

    def project(self, matrix: Tensor) -> Tensor:
        """Maps (rows, columns) into the subspace: r rows, r columns or both."""
        if self.left is not None:
            matrix = self.left.t() @ matrix
        return matrix if self.right is None else matrix @ self.right.t()

    def project_back(self, projected: Tensor) -> Tensor:
        """Maps from the subspace to (rows, columns)."""
        if self.left is not None:
            projected = self.left @ projected
        return projected if self.right is None else projected @ self.right


def new_basis(gradient: Tensor, rank: int, proj_type: str) -> Basis | None:
    """The first singular vectors of a gradient; where several processes train, those that process 0 has found.

    They are exact for matrices with a side of at most 256, and for larger ones approximate, which takes a tenth of the
    time; the random numbers for it are the same in each call, and none of the global generators'.

    Args:
        gradient: (rows, columns).
        rank: r; of a matrix with a shorter side, that side is taken.
        proj_type: A key of `PROJ_TYPES`.

    Returns:
        The basis in the gradient's dtype; None if the gradient has none because it is not finite.
    """
    rows, columns = gradient.shape
    rank = min(rank, rows, columns)
    matrix = gradient.float()
    decompose = _exact_svd if min(rows, columns) <= max(_LARGEST_EXACT_SIDE, 4 * rank) else _randomised_svd
    try:
        left, right = decompose(matrix, rank)
    except torch.linalg.LinAlgError:
        left, right = matrix.new_full((rows, rank), torch.nan), matrix.new_full((rank, columns), torch.nan)
    narrow, wide = ("right", "left") if rows >= columns else ("left", "right")
    side = {"std": narrow, "reverse_std": wide}.get(proj_type, proj_type)
    # Copies, since slices would keep the whole decomposition alive; one vector after the other in memory, as LAPACK has
    # them, so that products round as they do in galore-torch.
    vectors = {
        name: matrix.t().to(gradient.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, matrix in (("left", left), ("right", right))
        if side in (name, "full")
    }
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for matrix in vectors.values():
            dist.broadcast(matrix, src=0)
    # A fake tensor has no values to look at.
    if not isinstance(gradient, FakeTensor) and not all(matrix.isfinite().all() for matrix in vectors.values()):
        return None
    return Basis(**{name: matrix.t() for name, matrix in vectors.items()})


def _exact_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank]


def _randomised_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Halko et al. 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1; `torch.svd_lowrank` takes no generator."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    size = (matrix.shape[1], rank + _OVERSAMPLING)
    samples = torch.randn(size, generator=generator, dtype=matrix.dtype, device=matrix.device)
    span = torch.linalg.qr(matrix @ samples).Q
    for _ in range(_POWER_ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ span).Q).Q
    left, right = _exact_svd(span.t() @ matrix, rank)
    return span @ left, right
