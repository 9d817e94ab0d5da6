"""Batch normalisation in forms that torch lacks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional.convolution import needs_backward
from peft_edge.functional.recompute import can_overwrite, get_recompute, set_recompute


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    inplace: bool = False,
) -> Tensor:
    """Batch normalisation by fixed statistics, of which nothing is trained: its backward keeps one number a channel.

    Args:
        x: (B, C, *size).
        running_mean: (C,).
        running_var: (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        inplace: whether to write over x.
    """
    fixed = _Fixed(running_mean, running_var, weight, bias, eps)
    if not needs_backward():
        return fixed.normalise(x, inplace=inplace)
    recipe = get_recompute(x)
    y = _FrozenBatchNorm.apply(x, fixed, inplace)
    if recipe.is_plain:
        return y
    # Statistics may have moved on when the recipe is followed.
    mean, var, weight, bias = (None if value is None else value.detach().clone() for value in fixed[:4])
    return set_recompute(y, recipe.then(_Fixed(mean, var, weight, bias, eps).normalise))


class _Fixed(NamedTuple):
    """What normalises, (C,) each, and what is added to the variance."""

    mean: Any
    var: Any
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def normalise(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        if not inplace:
            return F.batch_norm(x, *self[:4], training=False, eps=self.eps)
        # The operator has places for the batch's statistics, too.
        out = x, self.mean.new_empty(0), self.mean.new_empty(0)
        torch.native_batch_norm(x, self.weight, self.bias, self.mean, self.var, False, 0.0, self.eps, out=out)
        return x


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, inplace: bool) -> Tensor:
        scale = torch.rsqrt(fixed.var + fixed.eps)
        scale = scale if fixed.weight is None else scale * fixed.weight
        ctx.save_for_backward(scale.view(1, -1, *[1] * (x.dim() - 2)))
        if inplace:
            ctx.mark_dirty(x)
        return fixed.normalise(x, inplace=inplace)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        is_ours = can_overwrite(gradient)
        scale = scale.to(gradient.dtype)
        return gradient.mul_(scale) if is_ours else gradient * scale, None, None


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradients[0])


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation by the statistics over all processes; `torch.nn.SyncBatchNorm` has no CPU form.

    Updates the running statistics in place, as `F.batch_norm` does.

    Args:
        x: (B, C, *size), of any B in each process.
        running_mean: (C,).
        running_var: (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        momentum: share of this batch in the running statistics.
        eps: added to the variance.

    Raises:
        ValueError: if there is one value a channel in all, which has no variance.
    """
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    values = x.to(running_mean.dtype)
    size = torch.tensor([values.numel() / values.shape[1]], dtype=torch.float64, device=x.device)
    # In double precision, so that the split of the batch over the processes does not show in the statistics.
    total = _SumOverProcesses.apply(torch.cat([values.sum(dims, dtype=torch.float64), size]))
    count = total[-1]
    mean = (total[:-1] / count).to(values.dtype)
    centred = values - mean.view(shape)
    # A second exchange: the difference of mean square and squared mean loses all digits where the mean is large.
    square_sum = _SumOverProcesses.apply(centred.square().sum(dims, dtype=torch.float64))
    var = (square_sum / count).to(values.dtype)
    with torch.no_grad():
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        running_mean.lerp_(mean, momentum)
        running_var.lerp_((square_sum / (count - 1)).to(var.dtype), momentum)
    y = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)
