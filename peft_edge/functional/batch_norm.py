"""BatchNorm that saves few bytes for the backward pass: the input or, if the norm is frozen, one number per channel.

In formulas, m and v are the mean and the variance of each channel. They are computed from the batch, or are constants.
n is the number of values per channel, w is `weight` and dY is the gradient of the output.

    y = (x - m) / sqrt(v + eps) * w + bias,    xhat = (x - m) / sqrt(v + eps)

The gradients are (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3; each sum is over the values of one channel):

    dbias = sum(dY),    dw = sum(dY xhat)
    dX = w / sqrt(v + eps) * (dY - dbias / n - xhat dw / n)      with statistics of the batch
    dX = w / sqrt(v + eps) * dY                                  with constant statistics

Usually x is the output of a convolution. If the norm saves x, the activation after the norm saves no further feature
map, because the backward pass of the activation recomputes y from x (see `peft_edge.functional.recompute`).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from peft_edge._compat import AutogradContext
from peft_edge.functional.convolution import needs_backward
from peft_edge.functional.recompute import (
    can_overwrite,
    fits_cache,
    get_recompute,
    has_standard_layout,
    iter_parts,
    memory_format_of,
    set_recompute,
)


def frozen_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inplace: bool = False
) -> Tensor:
    """Normalise x by constant statistics: y = (x - mean) / sqrt(var + eps) * weight + bias.

    x has the shape (B, C, *size) and is the only tensor that gets a gradient. All other tensors have the shape (C,). If
    `weight` is None, the factor is 1. If `bias` is None, 0 is added. The forward pass saves one number per channel for
    the backward pass. With `inplace`, the output overwrites x.
    """
    if not needs_backward():
        return _normalise(x, mean, var, weight, bias, eps=eps, overwrite=inplace)
    source = get_recompute(x)
    y = _FrozenBatchNorm.apply(x, mean, var, weight, bias, eps, inplace)
    if source.is_identity:
        return y
    # Copy the statistics, because they may change before the backward pass recomputes y.
    step = partial(_normalise, eps=eps)
    return set_recompute(y, source.then(step, mean.clone(), var.clone(), weight, bias, is_pointwise=True))


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, overwrite: bool
) -> Tensor:
    """Return the output of BatchNorm in eval mode, computed by torch's operator. With `overwrite`, overwrite x."""
    return _normalise_to(x if overwrite else None, x, mean, var, weight, bias, eps)


def _normalise_to(
    out: Tensor | None, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the output of BatchNorm in eval mode. Unless `out` is None, write to `out`, which may be x."""
    if out is None:
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    # The second and the third output are the statistics of the batch, which are empty in eval mode.
    outputs = out, mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps, out=outputs)
    return out


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        inplace: bool,
    ) -> Tensor:
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        ctx.save_for_backward(_per_channel(scale, x))
        if inplace:
            ctx.mark_dirty(x)
        return _normalise(x, mean, var, weight, bias, eps=eps, overwrite=inplace)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        overwrites = can_overwrite(gradient)
        scale = scale.to(gradient.dtype)
        return gradient.mul_(scale) if overwrites else gradient * scale, *[None] * 6


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape `values` from (C,) to (1, C, 1, ...), with as many dimensions as x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    synchronise: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Normalise x like `F.batch_norm`. For the backward pass, save only x and a few values per channel.

    If x can be recomputed from other tensors, the function saves these tensors instead of x. With `inplace`, the output
    may overwrite x, but only if x can be recomputed and `mean` is not None.

    In training mode, x is normalised by the statistics of the batch, and the running statistics `mean` and `var` are
    updated unless they are None. With `synchronise`, the statistics are computed over the batches of all processes of
    `torch.distributed`, also on CPUs (unlike `torch.nn.SyncBatchNorm`). Processes may then have different numbers of
    samples.

    Raises:
        ValueError: In training mode, if there is at most one value per channel, because one value has no variance.
        RuntimeError: In the backward pass, if the statistics were synchronised and a second derivative is needed.
    """
    trains = needs_backward() and any(value is not None and value.requires_grad for value in (x, weight, bias))
    if not synchronise and (torch.compiler.is_compiling() or not trains):
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if training and not synchronise:
        _check_count(x, x.numel() / x.shape[1])
    source = get_recompute(x)
    inplace = inplace and not source.is_identity and mean is not None
    y, *statistics = _BatchNorm.apply(x, weight, bias, mean, var, training, momentum, eps, synchronise, inplace)
    if not trains:
        return y
    step = partial(_normalise_by_batch if training else _normalise, eps=eps)
    return set_recompute(y, source.then(step, *statistics, weight, bias, is_pointwise=True))


def _check_count(x: Tensor, count: float) -> None:
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")


def _normalise_by_batch(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, overwrite: bool
) -> Tensor:
    """Return the output of BatchNorm in training mode. `invstd` is 1 / sqrt(v + eps), with the variance v of the batch.

    If gradients are enabled, the function computes the statistics again instead of using `mean` and `invstd`. With
    `overwrite`, the output may overwrite x.
    """
    if torch.is_grad_enabled():
        # A second derivative also needs the derivatives of the statistics.
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    scale = invstd if weight is None else invstd * weight
    # In training mode and in eval mode, torch's operator computes x * scale + (bias - mean * scale). The code below
    # computes the same expression, so its result is bit-identical to the output in training mode.
    shift = torch.addcmul(torch.zeros_like(mean) if bias is None else bias, mean, scale, value=-1)
    return _scale_and_shift(x, scale, shift, out=x if overwrite else None)


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor | None) -> Tensor:
    """Return x * scale + shift, where scale and shift have the shape (C,). Unless `out` is None, write to `out`."""
    if x.dtype == scale.dtype and memory_format_of(x) != torch.contiguous_format:
        # In channels-last format, `addcmul` takes half the time of torch's BatchNorm, and rounds in the same way.
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x), out=out)
    return _normalise_to(out, x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)


class _BatchNorm(torch.autograd.Function):
    """Returns the output, the mean and a third tensor.

    In training mode, the third tensor is 1 / sqrt(variance + eps). In eval mode, it is the variance.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        synchronise: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        node, inputs = get_recompute(x)
        ctx.x = node.add_user()
        ctx.training, ctx.eps, ctx.synchronises = training, eps, training and synchronise
        ctx.count = x.numel() // x.shape[1]
        if not training:
            y = _normalise(x, mean, var, weight, bias, eps=eps, overwrite=inplace)
            # Copy the statistics, because they may change before the backward pass.
            mean, spread = mean.clone(), var.clone()
        elif synchronise:
            mean, spread, ctx.count = _statistics_of_all_processes(x, mean, var, momentum, eps)
            y = _normalise_by_batch(x, mean, spread, weight, bias, eps=eps, overwrite=inplace)
        else:
            out = (x, torch.empty_like(mean), torch.empty_like(mean)) if inplace else None
            y, mean, spread = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps, out=out)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mean, spread, weight, *inputs)
        ctx.mark_non_differentiable(mean, spread)
        ctx.set_materialize_grads(False)
        return y, mean, spread

    @staticmethod
    def backward(ctx: AutogradContext, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        overwrites = can_overwrite(grad_y)
        mean, spread, weight, *inputs = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        x = ctx.x.value(inputs)
        statistics = (None, None, mean, spread) if ctx.training else (mean, spread, None, None)
        torch_backward = torch.ops.aten.native_batch_norm_backward
        if torch.is_grad_enabled() and ctx.synchronises:
            raise RuntimeError("BatchNorm over all processes has no second derivative. Train in a single process.")
        if has_standard_layout(x) and grad_y.stride() != x.stride():
            # Pooling returns contiguous gradients even for channels-last maps.
            grad_y, overwrites = torch.empty_like(x, dtype=grad_y.dtype).copy_(grad_y), True
        if torch.is_grad_enabled() or (fits_cache(x) and not ctx.synchronises):
            # Autograd can differentiate this operator. For a small map, it is also faster than the code below, and the
            # new map that it allocates for dX is small.
            mask = wants_x, wants_weight, wants_bias
            return *torch_backward(grad_y, x, weight, *statistics, ctx.training, ctx.eps, mask), *[None] * 7
        # Sum dY for the gradient of the bias, and dY * xhat for the gradient of the weight.
        arguments = grad_y, x, weight, *statistics, ctx.training, ctx.eps
        _, product_sum, grad_sum = torch_backward(*arguments, (False, True, True))
        grad_x = None
        if wants_x:
            # dX = scale * dY + offset + slope * x
            invstd = spread if ctx.training else torch.rsqrt(spread + ctx.eps)
            scale = invstd if weight is None else invstd * weight
            slope = offset = torch.zeros_like(mean)
            if ctx.training:
                sums = torch.stack([grad_sum, product_sum])
                if ctx.synchronises:
                    dist.all_reduce(sums)
                offset, slope = -scale * sums / ctx.count
                slope = slope * invstd
                offset = offset - slope * mean
            grad_x = grad_y if overwrites else torch.empty_like(grad_y)
            for x_part, part, out in iter_parts(x, grad_y, grad_x):
                # Compute in the precision of the statistics, which may be higher than that of the feature maps.
                is_exact = out.dtype == mean.dtype
                result = _scale_and_shift(part.to(mean.dtype), scale, offset, out=out if is_exact else None)
                if ctx.training:
                    result.addcmul_(x_part.to(mean.dtype), _per_channel(slope, part))
                if not is_exact:
                    out.copy_(result)
        return grad_x, product_sum if wants_weight else None, grad_sum if wants_bias else None, *[None] * 7


def _statistics_of_all_processes(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, float]:
    """Update the running statistics in place, and return statistics of each channel over the batches of all processes.

    The result contains the mean, 1 / sqrt(variance + eps), and the number of values per channel.
    """
    dims = [0, *range(2, x.dim())]
    values = x.to(running_mean.dtype)
    # Sum in double precision, so that the result does not depend on how the batch is split over the processes.
    total = values.sum(dims, dtype=torch.float64)
    total = torch.cat([total, total.new_tensor([values.numel() / values.shape[1]])])
    dist.all_reduce(total)
    count = float(total[-1])
    mean = (total[:-1] / count).to(values.dtype)
    # Sum the squared deviations in a second pass. The formula E[x²] - E[x]² would lose all digits if the mean is much
    # larger than the standard deviation.
    square_sum = (values - _per_channel(mean, x)).square_().sum(dims, dtype=torch.float64)
    dist.all_reduce(square_sum)
    _check_count(x, count)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_((square_sum / (count - 1)).to(running_var.dtype), momentum)
    return mean, torch.rsqrt((square_sum / count).to(values.dtype) + eps), count
