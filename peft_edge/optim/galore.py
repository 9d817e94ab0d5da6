"""GaLore optimizers (Zhao et al. 2024, arXiv 2403.03507) for matrices and convolution kernels, with low-rank states.

GaLore projects the gradient G of a weight W to a matrix R of r rows. An optimizer computes an update rho(R) from this
projected gradient, and GaLore projects the update back (algorithm 2 of the paper):

    R = P^T G,    W <- W - lr * scale * P rho(R).

The columns of P are the first r left singular vectors of a recent gradient. A projection to r columns uses the first r
right singular vectors instead, as the columns of Q: R = G Q, W <- W - lr * scale * rho(R) Q^T. A kernel
(C_out, C_in/g, kh, kw) is treated as a matrix (C_out, K) with K = C_in/g * kh * kw. With a projection to r rows, Adam
stores P and two averages of shape (r, K). Without a projection, the two averages have the shape (C_out, K).

Parameter groups have the keys of galore-torch, with the defaults of Transformers:

- `rank`: r. Groups without this key are not projected: AdamW, SGD or Adafactor updates them as usual.
- `update_proj_gap`: Number of steps between two computations of P (default: 200).
- `scale`: Factor by which the update is multiplied (default: 0.25).
- `proj_type`: A key of `PROJ_TYPES` (default: `"std"`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT
from transformers.optimization import Adafactor

from peft_edge._compat import call_without_hooks, is_fake

ParamGroup = dict[str, Any]
State = dict[str, Tensor]

PROJ_TYPES: dict[str, str] = {
    "std": "project the shorter side of the matrix; in a square matrix, the columns",
    "reverse_std": "project the longer side of the matrix; in a square matrix, the rows",
    "right": "project the columns",
    "left": "project the rows",
    "full": "project rows and columns",
}

_DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


class Basis(NamedTuple):
    """The singular vectors that project a matrix.

    The columns of `left` (rows, r) are left singular vectors, and the rows of `right` (r, columns) are right singular
    vectors. `left` is None if the rows are not projected. `right` is None if the columns are not projected.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def project(self, matrix: Tensor) -> Tensor:
        """Return `left.T @ matrix @ right.T`. A factor that is None is left out."""
        if self.left is not None:
            matrix = self.left.t() @ matrix
        return matrix if self.right is None else matrix @ self.right.t()

    def project_back(self, projected: Tensor) -> Tensor:
        """Return `left @ projected @ right`, of shape (rows, columns). A factor that is None is left out."""
        if self.left is not None:
            projected = self.left @ projected
        return projected if self.right is None else projected @ self.right


def new_basis(gradient: Tensor, rank: int, proj_type: str) -> Basis | None:
    """Return the first `rank` singular vectors of the matrix `gradient`: left, right or both, as `proj_type` selects.

    The SVD is exact if the shorter side of `gradient` is at most 256 or at most four times `rank`. Otherwise the SVD is
    randomised. It then uses a new generator with a fixed seed, and leaves torch's global generator unchanged. In
    distributed training, all processes use the vectors of process 0. The vectors have the dtype of `gradient`. The
    function returns None if the SVD fails or a vector is not finite, for example because `gradient` contains NaN.
    """
    rows, columns = gradient.shape
    rank = min(rank, rows, columns)
    matrix = gradient.float()
    try:
        left, right = _singular_vectors(matrix, rank)
    except torch.linalg.LinAlgError:  # if this is process 0, all processes receive NaN and return None
        left, right = matrix.new_full((rows, rank), torch.nan), matrix.new_full((rank, columns), torch.nan)
    shorter, longer = ("right", "left") if rows >= columns else ("left", "right")
    side = {"std": shorter, "reverse_std": longer}.get(proj_type, proj_type)
    # Copy the vectors (`copy=True`), because a slice would keep the whole decomposition in memory. The matrices are
    # stored in column-major order, as LAPACK returns them, so that matrix products round as in galore-torch.
    vectors = {
        name: matrix.t().to(gradient.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, matrix in (("left", left), ("right", right))
        if side in (name, "full")
    }
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for matrix in vectors.values():
            dist.broadcast(matrix, src=0)
    if not is_fake(gradient) and not all(matrix.isfinite().all() for matrix in vectors.values()):
        return None
    return Basis(**{name: matrix.t() for name, matrix in vectors.items()})


def _singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first `rank` left and right singular vectors, of shape (rows, rank) and (rank, columns)."""
    if min(matrix.shape) > max(256, 4 * rank):
        # Algorithms 4.4 and 5.1 of Halko et al. 2011 (arXiv 0909.4061), with two power iterations, and with 8 more
        # samples than the rank. `torch.svd_lowrank` is not used, because it does not accept a generator.
        generator = torch.Generator(matrix.device).manual_seed(0)
        size = (matrix.shape[1], rank + 8)
        samples = torch.randn(size, generator=generator, dtype=matrix.dtype, device=matrix.device)
        span = torch.linalg.qr(matrix @ samples).Q
        for _ in range(2):
            span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ span).Q).Q
        left, _, right = torch.linalg.svd(span.t() @ matrix, full_matrices=False)
        return span @ left[:, :rank], right[:rank]
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank]


class _GaLore(Optimizer):
    """Base class of the GaLore optimizers, to be combined with a second base class such as `AdamW`.

    `step` calls `_update` for groups with `rank`, and `step` of the second base class for groups without `rank`.
    """

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a parameter group. If it has the key `rank`, the gradients of its parameters are projected.

        Raises:
            ValueError: If a group with `rank` has an invalid value of a GaLore key, or contains a parameter with fewer
                than two dimensions.
        """
        if "rank" not in param_group:
            super().add_param_group(param_group)
            return
        param_group = {**_DEFAULTS, **param_group}
        for key in ("rank", "update_proj_gap"):
            if not isinstance(param_group[key], int) or param_group[key] < 1:
                raise ValueError(f"{key} is {param_group[key]!r}, expected an integer of at least 1")
        if param_group["proj_type"] not in PROJ_TYPES:
            raise ValueError(f"proj_type is {param_group['proj_type']!r}, expected one of: {', '.join(PROJ_TYPES)}")
        super().add_param_group(param_group)
        vectors = [tuple(parameter.shape) for parameter in self.param_groups[-1]["params"] if parameter.ndim < 2]
        if vectors:
            del self.param_groups[-1]
            raise ValueError(
                f"a group with rank has parameters of the shapes {vectors}, expected two dimensions or more: put these "
                "parameters in a group without rank, as galore_param_groups does"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        For each weight in a group with `rank`, a basis (the singular vectors of a gradient) is computed in the first
        step and then every `update_proj_gap` steps. If the computation fails, for example because the gradient is not
        finite, the optimizer warns, and leaves this weight and its state unchanged. The next step then computes the
        basis again. `closure` computes the gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        projected = [(weight, group) for group in groups if "rank" in group for weight in group["params"]]
        skipped = [w for w, group in projected if w.grad is not None and not self._step_projected(w, w.grad, group)]
        if skipped:
            warnings.warn(
                f"{len(skipped)} projected weights need a new basis, but have a gradient that is not finite. This step "
                f"leaves them unchanged. The shape of the first is {tuple(skipped[0].shape)}.",
                stacklevel=2,
            )
        if ordinary := [group for group in groups if "rank" not in group]:
            self.param_groups = ordinary
            try:
                call_without_hooks(super().step)
            finally:
                self.param_groups = groups
        return loss

    def _step_projected(self, weight: Tensor, grad: Tensor, group: ParamGroup) -> bool:
        """Update a projected weight, and return True.

        If a new basis must be computed and `new_basis` returns None, change nothing and return False.
        """
        state, gradient = self.state[weight], grad.flatten(1)
        step = int(state["step"]) if state else 0
        if step % group["update_proj_gap"] == 0:
            basis = new_basis(gradient, group["rank"], group["proj_type"])
            if basis is None:
                return False
            state.update({f"basis_{side}": vectors for side, vectors in basis._asdict().items() if vectors is not None})
        # Store `step` as a tensor, because AdamW's `load_state_dict` would convert a number to a tensor anyway.
        state["step"] = torch.tensor(step + 1.0)
        basis = Basis(state.get("basis_left"), state.get("basis_right"))
        self._update(weight, gradient, basis, state, group, step + 1)
        return True

    def _update(self, weight: Tensor, grad: Tensor, basis: Basis, state: State, group: ParamGroup, step: int) -> None:
        """Update `weight` of shape (C_out, C_in/g, *kernel) in place.

        `grad` is its gradient as a matrix (C_out, K), where K is the number of weights per output channel. `step` is
        the number of this step, counted from 1.
        """
        raise NotImplementedError


class GaLoreAdamW(_GaLore, AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with the projected gradients of GaLore.

    In groups with `rank`, `exp_avg` and `exp_avg_sq` are running averages of the projected gradient R and of R^2. As in
    galore-torch, `eps` is added before bias correction, and weight decay is not projected. The arguments are the first
    five of `torch.optim.AdamW`; their defaults are those of galore-torch.

    Raises:
        ValueError: If an argument is out of range, or `add_param_group` rejects a group.

    Example:
        >>> from peft_edge.optim import GaLoreAdamW, galore_param_groups
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-3)
        >>> model(torch.randn(2, 16, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(value.shape) for key, value in optimizer.state[model[0].weight].items()}
        {'basis_left': (32, 4), 'step': (), 'exp_avg': (4, 144), 'exp_avg_sq': (4, 144)}
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

    def _update(self, weight: Tensor, grad: Tensor, basis: Basis, state: State, group: ParamGroup, step: int) -> None:
        projected = basis.project(grad)
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
    """SGD with the projected gradients of GaLore, and with momentum as in `torch.optim.SGD`.

    In groups with `rank`, one step computes

        R = P^T (G + weight_decay W),    V <- momentum V + R,    W <- W - lr * scale * P V,

    where G is the gradient of the weight W, the columns of P are singular vectors of a recent gradient, and R is the
    projected gradient. The state `momentum_buffer` is V and has the shape of R. Unlike `torch.optim.SGD`, this class
    has no `dampening`, no `nesterov` and no keyword-only arguments, and the default of `momentum` is 0.9.

    Raises:
        ValueError: If an argument is out of range, or `add_param_group` rejects a group.

    Example:
        >>> from peft_edge.optim import GaLoreSGD, galore_param_groups
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> optimizer = GaLoreSGD(galore_param_groups(model, rank=4), lr=0.1)
        >>> model(torch.randn(2, 16, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["momentum_buffer"].shape
        torch.Size([4, 144])
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(self, weight: Tensor, grad: Tensor, basis: Basis, state: State, group: ParamGroup, step: int) -> None:
        projected = basis.project(grad.add(weight.flatten(1), alpha=group["weight_decay"]))
        if step == 1:
            state["momentum_buffer"] = torch.zeros_like(projected)
        direction = basis.project_back(state["momentum_buffer"].mul_(group["momentum"]).add_(projected))
        weight.add_(direction.view_as(weight), alpha=-group["lr"] * group["scale"])


class GaLoreAdafactor(_GaLore, Adafactor):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with the projected gradients of GaLore.

    In groups with `rank`, `exp_avg_sq_row` and `exp_avg_sq_col` are running averages of the row and column means of
    R^2, where R is the projected gradient. Weight decay is not projected. The arguments are the first seven of
    `transformers.Adafactor`. As in Transformers' GaLore, `scale_parameter` and `relative_step` are always False, so
    `lr` is the step size and `eps[1]` has no effect.

    Raises:
        ValueError: If `add_param_group` rejects a group.

    Example:
        >>> from peft_edge.optim import GaLoreAdafactor, galore_param_groups
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> optimizer = GaLoreAdafactor(galore_param_groups(model, rank=4), lr=1e-3)
        >>> [group.get("rank") for group in optimizer.param_groups]
        [4, None]
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
        options: ParamGroup = {"eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        super().__init__(  # type: ignore[call-arg]
            params, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, **options
        )

    def _update(self, weight: Tensor, grad: Tensor, basis: Basis, state: State, group: ParamGroup, step: int) -> None:
        projected = basis.project(grad)
        squared = projected.square().add_(group["eps"][0])
        rows, columns = squared.mean(dim=1, keepdim=True), squared.mean(dim=0, keepdim=True)
        if step == 1:
            state.update(exp_avg_sq_row=torch.zeros_like(rows), exp_avg_sq_col=torch.zeros_like(columns))
        new_fraction = step ** group["decay_rate"]
        rows = state["exp_avg_sq_row"].mul_(1 - new_fraction).add_(rows, alpha=new_fraction)
        columns = state["exp_avg_sq_col"].mul_(1 - new_fraction).add_(columns, alpha=new_fraction)
        update = (rows / rows.mean()).rsqrt() * columns.rsqrt() * projected
        root_mean_square = update.norm() / math.sqrt(update.numel())
        update.div_((root_mean_square / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
        if group["beta1"] is not None:
            average = state.setdefault("exp_avg", torch.zeros_like(update))
            update = average.mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
        weight.sub_(basis.project_back(update).view_as(weight), alpha=group["scale"])
