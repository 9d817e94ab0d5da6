"""A frozen BatchNorm that saves one number per channel, and a synchronised BatchNorm that also runs on CPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from peft_edge._compat import AutogradContext
from peft_edge.functional.convolution import needs_backward
from peft_edge.functional.recompute import can_overwrite, get_recompute, set_recompute


def frozen_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inplace: bool = False
) -> Tensor:
    """Normalise x by constant statistics: y = (x - mean) / sqrt(var + eps) * weight + bias.

    x has the shape (B, C, *size) and is the only tensor that gets a gradient. All other tensors have the shape (C,). If
    `weight` is None, the factor is 1. If `bias` is None, 0 is added. The forward pass saves one number per channel for
    the backward pass. With `inplace`, y overwrites x.
    """
    norm = _ConstantNorm(mean, var, weight, bias, eps)
    if not needs_backward():
        return norm.normalise(x, inplace=inplace)
    recompute = get_recompute(x)
    y = _FrozenBatchNorm.apply(x, norm, inplace)
    # Store a copy of the norm, because the statistics may change before the backward pass recomputes y.
    return y if recompute.is_identity else set_recompute(y, recompute.then(norm.snapshot().normalise))


class _ConstantNorm(NamedTuple):
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def normalise(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        if not inplace:
            return F.batch_norm(x, *self[:4], training=False, eps=self.eps)
        # The second and the third output are the statistics of the batch, which are empty in eval mode.
        out = x, self.mean.new_empty(0), self.mean.new_empty(0)
        torch.native_batch_norm(x, self.weight, self.bias, self.mean, self.var, False, 0.0, self.eps, out=out)
        return x

    def snapshot(self) -> _ConstantNorm:
        weight, bias = (None if value is None else value.detach().clone() for value in (self.weight, self.bias))
        return _ConstantNorm(self.mean.detach().clone(), self.var.detach().clone(), weight, bias, self.eps)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, norm: _ConstantNorm, inplace: bool) -> Tensor:
        scale = torch.rsqrt(norm.var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        ctx.save_for_backward(scale.view(1, -1, *[1] * (x.dim() - 2)))
        if inplace:
            ctx.mark_dirty(x)
        return norm.normalise(x, inplace=inplace)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        overwrites = can_overwrite(gradient)
        scale = scale.to(gradient.dtype)
        return gradient.mul_(scale) if overwrites else gradient * scale, None, None


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise x by the mean and variance over the batches of all processes, and update the running statistics.

    Unlike `torch.nn.SyncBatchNorm`, this function runs on CPUs. `torch.distributed` must be initialised. The arguments
    have the meaning of those of `F.batch_norm` in training mode. Processes may have different numbers of samples. The
    result has the dtype of x.

    Raises:
        ValueError: If all processes together have at most one value per channel, because one value has no variance.
    """
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    values = x.to(running_mean.dtype)
    size = torch.tensor([values.numel() / values.shape[1]], dtype=torch.float64, device=x.device)
    # Sum in double precision, so that the result does not depend on how the batch is split over the processes.
    total = _SumOverProcesses.apply(torch.cat([values.sum(dims, dtype=torch.float64), size]))
    count = total[-1]
    mean = (total[:-1] / count).to(values.dtype)
    centred = values - mean.view(shape)
    # Sum again over all processes: E[x²] - E[x]² would lose all digits if the mean is much larger than the deviation.
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


class _SumOverProcesses(torch.autograd.Function):
    """Sums a tensor over all processes. The backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)
