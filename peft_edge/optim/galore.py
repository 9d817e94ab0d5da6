"""The low-rank subspace that GaLore (Zhao et al. 2024, arXiv 2403.03507) projects the gradient of a matrix into.

GaLore (Zhao et al. 2024, arXiv 2403.03507) for weights of any shape: optimizers whose state has low rank.

The gradient of a weight is projected to a few rows or columns, the optimizer works on these, and its update is
projected back. A kernel (C_out, C_in/g, *kernel) is read as the matrix (C_out, K), K = C_in/g * prod(kernel).

Groups of parameters have the keys of galore-torch. Those with `rank` are projected:

- `rank`: rows or columns that remain.
- `update_proj_gap`: steps from one basis to the next, by default 200.
- `scale`: factor of the projected updates, by default 0.25.
- `proj_type`: a key of `PROJ_TYPES`, by default `"std"`.

The others are trained as by the optimizer that a class is named after. `galore_param_groups` makes the groups of a
model. The state holds tensors only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT
from transformers.optimization import Adafactor

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


_DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


class _GaLore(Optimizer):
    """Updates the groups with `rank`, and leaves the others to the next class."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: A key of GaLore has a value that it cannot have, or a projected parameter is a vector.
        """
        if "rank" not in param_group:
            super().add_param_group(param_group)
            return
        param_group = {**_DEFAULTS, **param_group}
        for key in ("rank", "update_proj_gap"):
            if not isinstance(param_group[key], int) or param_group[key] < 1:
                raise ValueError(f"{key} is {param_group[key]!r}, expected a whole number of at least 1")
        if param_group["proj_type"] not in PROJ_TYPES:
            raise ValueError(f"proj_type is {param_group['proj_type']!r}, expected one of: {', '.join(PROJ_TYPES)}")
        super().add_param_group(param_group)
        vectors = [tuple(parameter.shape) for parameter in self.param_groups[-1]["params"] if parameter.ndim < 2]
        if vectors:
            del self.param_groups[-1]
            raise ValueError(
                f"a group with rank has parameters of the shapes {vectors}, expected two dimensions or more: put them "
                "in a group without rank, as galore_param_groups does"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        A projected weight gets a basis in its first step, and a new one every `update_proj_gap` of its steps. If its
        gradient is not finite then, a warning is given, and the weight and its state stay as they are; its next step
        tries again.

        Args:
            closure: Computes the gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        skipped = [
            weight
            for group in groups
            for weight in (group["params"] if "rank" in group else ())
            if weight.grad is not None and not self._step_projected(weight, group)
        ]
        if skipped:
            warnings.warn(
                f"{len(skipped)} projected weights, the first of the shape {tuple(skipped[0].shape)}, have a gradient "
                "that is not finite where a new basis is due: they stay as they are in this step, their bases too",
                stacklevel=2,
            )
        if plain := [group for group in groups if "rank" not in group]:
            self.param_groups = plain
            try:
                self._step_of_next_class()
            finally:
                self.param_groups = groups
        return loss

    def _step_of_next_class(self) -> None:
        step: Any = super().step
        # Torch makes each class's step call the hooks, and the step that this one is a part of has called them.
        step.__wrapped__(self) if getattr(step, "hooked", False) else step()

    def _step_projected(self, weight: Tensor, group: dict[str, Any]) -> bool:
        assert weight.grad is not None
        state, gradient = self.state[weight], weight.grad.flatten(1)
        step = int(state["step"]) if state else 0
        if step % group["update_proj_gap"] == 0:
            basis = new_basis(gradient, group["rank"], group["proj_type"])
            if basis is None:
                return False
            state.update({f"basis_{side}": vectors for side, vectors in basis._asdict().items() if vectors is not None})
        # A tensor, since torch makes it one when a state is loaded.
        state["step"] = torch.tensor(step + 1.0)
        basis = Basis(state.get("basis_left"), state.get("basis_right"))
        self._update(weight, gradient, basis, state, group, step + 1)
        return True

    def _update(
        self, weight: Tensor, gradient: Tensor, basis: Basis, state: dict[str, Any], group: dict[str, Any], step: int
    ) -> None:
        """Updates one weight in place.

        Args:
            weight: (C_out, C_in/g, *kernel).
            gradient: (C_out, K).
            basis: To project it.
            state: The weight's.
            group: The weight's.
            step: Counted from 1.
        """
        raise NotImplementedError


class GaLoreAdamW(_GaLore, AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with projected gradients.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the running averages of the gradient and its square.
        eps: Added to the root of the latter; for projected weights, as in galore-torch, before the averages are
            corrected for their start at zero.
        weight_decay: Decoupled, and of the whole weight.

    Raises:
        ValueError: A value is out of its range, or `add_param_group` refuses a group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(
        self, weight: Tensor, gradient: Tensor, basis: Basis, state: dict[str, Any], group: dict[str, Any], step: int
    ) -> None:
        projected = basis.project(gradient)
        if step == 1:
            state.update(exp_avg=torch.zeros_like(projected), exp_avg_sq=torch.zeros_like(projected))
        beta1, beta2 = group["betas"]
        exp_avg = state["exp_avg"].mul_(beta1).add_(projected, alpha=1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        direction = basis.project_back(exp_avg / exp_avg_sq.sqrt().add_(group["eps"]))
        weight.add_(direction.view_as(weight), alpha=-step_size * group["scale"])
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])


class GaLoreSGD(_GaLore, SGD):
    """SGD with momentum (Sutskever et al. 2013) and projected gradients.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        momentum: Decay of the running sum of the gradients.
        weight_decay: Times the weight, added to the gradient before it is projected.

    Raises:
        ValueError: A value is out of its range, or `add_param_group` refuses a group.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(
        self, weight: Tensor, gradient: Tensor, basis: Basis, state: dict[str, Any], group: dict[str, Any], step: int
    ) -> None:
        projected = basis.project(gradient.add(weight.flatten(1), alpha=group["weight_decay"]))
        if step == 1:
            state["momentum_buffer"] = torch.zeros_like(projected)
        direction = basis.project_back(state["momentum_buffer"].mul_(group["momentum"]).add_(projected))
        weight.add_(direction.view_as(weight), alpha=-group["lr"] * group["scale"])


class GaLoreAdafactor(_GaLore, Adafactor):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with projected gradients.

    The step size is `lr`, as Transformers sets it up for GaLore: relative neither to the weights nor to the step.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        eps: Of which the first is added to the squared gradient.
        clip_threshold: Largest root mean square of an update, in units of `lr`.
        decay_rate: Exponent of the step in the decay of the running averages.
        beta1: Decay of the running average of the updates; None for none.
        weight_decay: Decoupled, and of the whole weight.

    Raises:
        ValueError: `add_param_group` refuses a group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            params,
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
        )

    def _update(
        self, weight: Tensor, gradient: Tensor, basis: Basis, state: dict[str, Any], group: dict[str, Any], step: int
    ) -> None:
        projected = basis.project(gradient)
        squared = projected.square().add_(group["eps"][0])
        rows, columns = squared.mean(dim=1, keepdim=True), squared.mean(dim=0, keepdim=True)
        if step == 1:
            state.update(exp_avg_sq_row=torch.zeros_like(rows), exp_avg_sq_col=torch.zeros_like(columns))
        share = step ** group["decay_rate"]
        rows = state["exp_avg_sq_row"].mul_(1 - share).add_(rows, alpha=share)
        columns = state["exp_avg_sq_col"].mul_(1 - share).add_(columns, alpha=share)
        update = (rows / rows.mean()).rsqrt() * columns.rsqrt() * projected
        root_mean_square = update.norm() / math.sqrt(update.numel())
        update.div_((root_mean_square / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
        if group["beta1"] is not None:
            average = state.setdefault("exp_avg", torch.zeros_like(update))
            update = average.mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
        weight.sub_(basis.project_back(update).view_as(weight), alpha=group["scale"])
