"""Layers that keep for the backward pass only what it needs.

Each stands in for a layer of torch's or timm's with the same parameters: a module becomes lean, and plain again, by a
change of its class. What is trained, and what is compiled, is computed in the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_edge.functional.activations import Kept, clipped_activation, gated, smooth_activation
from peft_edge.functional.batch_norm import frozen_batch_norm
from peft_edge.functional.convolution import frozen_convolution, needs_backward, pad
from peft_edge.functional.recompute import get_recompute
from peft_edge.lean.inplace_norm import InplaceNorm, ModuleRef, is_overwritable, mark_overwritable

Masks = Literal["byte", "bit", "off"]


def _trains(layer: Any) -> bool:
    # By what is there, which need not be parameters: a parametrisation computes the weight.
    return any(value is not None and value.requires_grad for value in (layer.weight, layer.bias))


def _is_plain(x: Tensor) -> bool:
    """Whether there is no backward pass to keep anything for, or a compiler sees to that."""
    return torch.compiler.is_compiling() or not (needs_backward() and x.requires_grad)


def keeps_input(module: nn.Module) -> bool:
    """Whether a layer keeps its input for the backward pass, as far as one can tell."""
    known = getattr(module, "keeps_input", None)
    if known is not None:
        return known
    return isinstance(module, _POOLS) or any(parameter.requires_grad for parameter in module.parameters())


# torch's pooling asks for its input again, if only for the shape.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


_CHEAP_PRODUCTS = 96


class LeanConvolution(nn.Module):
    """A convolution that keeps its kernel alone, where autograd's keeps the input too.

    Attributes:
        inplace_pair: the norm behind it that may write over its output, or None.
        recompute: whether its output may be made again, if that is cheap.
    """

    inplace_pair: InplaceNorm | None = None
    recompute: bool = False

    @property
    def keeps_input(self) -> bool:
        """Whether its backward needs its input: while it is trained."""
        return _trains(self)

    @property
    def lets_recompute(self: Any) -> bool:
        """Whether an adapter of it, which keeps the input, lets others make the output from that."""
        return self.recompute and self.weight[0].numel() <= _CHEAP_PRODUCTS

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps (B, C_in, *size) as the plain layer does."""
        if _trains(self):
            return mark_overwritable(super().forward(x), self)
        x, geometry = pad(self, x)
        return mark_overwritable(frozen_convolution(x, self.weight, self.bias, geometry), self)


class LeanBatchNorm(nn.Module):
    """Batch normalisation that keeps one number a channel while its statistics are fixed."""

    @property
    def keeps_input(self: Any) -> bool:
        """Whether its backward needs its input: while it normalises by the batch, or is trained."""
        return self.training or self.running_mean is None or _trains(self)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps (B, C, *size) as the plain layer does."""
        if self.keeps_input or torch.compiler.is_compiling():
            return super().forward(x)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        x = frozen_batch_norm(x, *statistics, self.eps, inplace=is_overwritable(x, self))
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x


class LeanClippedActivation(nn.Module):
    """ReLU and its kin, keeping a mask, or the output where what comes next keeps it anyway.

    Attributes:
        masks: what a mask has for each element; `"off"` for the output in any case.
        consumers: where the layers are that take the output.
        feeds_product: whether the output also goes into a product, which keeps it.
    """

    masks: Masks = "byte"
    consumers: Sequence[ModuleRef] = ()
    feeds_product: bool = False
    upper = float("inf")

    def kept(self) -> Kept:
        """What its backward keeps now."""
        takers = filter(None, (slot.module for slot in self.consumers))
        if self.masks == "off" or self.feeds_product or any(map(keeps_input, takers)):
            return "output"
        return self.masks

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps as the plain layer does."""
        plain = super().forward
        if _is_plain(x):
            return plain(x)
        can_be_made = self.masks != "off" and not get_recompute(x).is_plain
        keep = self.masks if can_be_made else self.kept()
        return clipped_activation(x, plain, upper=self.upper, keep=keep, inplace=self.inplace)


class LeanSmoothActivation(nn.Module):
    """Hard-swish and its kin, keeping the input alone also where the plain layer works in place."""

    keeps_input = True
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps as the plain layer does."""
        if _is_plain(x):
            return super().forward(x)
        return smooth_activation(x, type(self).function, type(self).derivative)


class _Gating(TorchFunctionMode):
    """Replaces the product of a tensor and its gate."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("mul", "__mul__") and args[0] is self._x and isinstance(args[1], Tensor):
            return gated(*args)
        return func(*args, **(kwargs or {}))


class LeanGate(nn.Module):
    """Squeeze-excite that keeps its input as what that can be made from."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) as the plain layer does."""
        if _is_plain(x):
            return super().forward(x)
        with _Gating(x):
            return super().forward(x)


class LeanConv1d(LeanConvolution, nn.Conv1d):
    """`Conv1d`, lean while frozen."""


class LeanConv2d(LeanConvolution, nn.Conv2d):
    """`Conv2d`, lean while frozen."""


class LeanConv2dSame(LeanConvolution, Conv2dSame):
    """timm's `Conv2dSame`, lean while frozen."""


class LeanConv3d(LeanConvolution, nn.Conv3d):
    """`Conv3d`, lean while frozen."""


class LeanBatchNorm1d(LeanBatchNorm, nn.BatchNorm1d):
    """`BatchNorm1d`, lean while frozen."""


class LeanBatchNorm2d(LeanBatchNorm, nn.BatchNorm2d):
    """`BatchNorm2d`, lean while frozen."""


class LeanBatchNorm3d(LeanBatchNorm, nn.BatchNorm3d):
    """`BatchNorm3d`, lean while frozen."""


class LeanBatchNormAct2d(LeanBatchNorm, BatchNormAct2d):
    """timm's `BatchNormAct2d`, lean while frozen."""


class LeanReLU(LeanClippedActivation, nn.ReLU):
    """`ReLU` that keeps a mask."""


class LeanReLU6(LeanClippedActivation, nn.ReLU6):
    """`ReLU6` that keeps a mask."""

    upper = 6.0


class LeanHardswish(LeanSmoothActivation, nn.Hardswish):
    """`Hardswish` that keeps its input alone."""

    function = staticmethod(F.hardswish)
    derivative = staticmethod(torch.ops.aten.hardswish_backward)


class LeanSqueezeExcite(LeanGate, SqueezeExcite):
    """`SqueezeExcite` of timm's mobile networks."""


class LeanSEModule(LeanGate, SEModule):
    """timm's `SEModule`."""


class LeanSiLU(LeanSmoothActivation, nn.SiLU):
    """`SiLU` that keeps its input alone."""

    function = staticmethod(F.silu)
    derivative = staticmethod(torch.ops.aten.silu_backward)


LEAN: dict[type[nn.Module], type[nn.Module]] = {
    lean.__mro__[2]: lean
    for lean in (
        LeanConv1d,
        LeanConv2d,
        LeanConv2dSame,
        LeanConv3d,
        LeanBatchNorm1d,
        LeanBatchNorm2d,
        LeanBatchNorm3d,
        LeanBatchNormAct2d,
        LeanReLU,
        LeanReLU6,
        LeanHardswish,
        LeanSiLU,
        LeanSqueezeExcite,
        LeanSEModule,
    )
}
"""The lean layer for each plain one, by its exact class."""

PLAIN = {lean: plain for plain, lean in LEAN.items()}
"""The plain layer for each lean one."""
