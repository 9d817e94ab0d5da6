"""Layers that save only what their backward pass needs.

Each lean class extends one class of torch or timm. `prepare_model_for_lean_training` changes the class of a module, and
`undo_lean_training` restores the class. Trainable layers, and norms that normalise by the statistics of the batch, run
the original forward pass. In compiled models, norms, activations and gates run the original forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, SEModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_edge._compat import BatchNorm, ConvolutionBase, SqueezeExcite
from peft_edge.functional.activations import Kept, clipped_activation, gated_product, smooth_activation
from peft_edge.functional.batch_norm import frozen_batch_norm
from peft_edge.functional.convolution import frozen_convolution, needs_backward, pad
from peft_edge.functional.recompute import get_recompute
from peft_edge.lean.inplace_norm import InplaceNorm, ModuleRef, is_overwritable, mark_overwritable

Function = Callable[..., object]

Masks = Literal["byte", "bit", "off"]
"""The size of a mask per element. With "off", clipped activations save their output instead of a mask."""

# The output of a convolution is recomputed only if it takes at most this many products per output element.
_MAX_RECOMPUTED_PRODUCTS = 96

# torch's pooling layers save their input, even if they need only its shape.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def layer_keeps_input(module: nn.Module) -> bool:
    """Return whether a layer saves its input. The result is an estimate if `keeps_input` is missing or None."""
    known = getattr(module, "keeps_input", None)
    if known is not None:
        return known
    return isinstance(module, _POOLS) or any(parameter.requires_grad for parameter in module.parameters())


def _trains(layer: ConvolutionBase | BatchNorm) -> bool:
    # Do not use `parameters()`, because a weight that a parametrisation computes is not a parameter.
    return any(value is not None and value.requires_grad for value in (layer.weight, layer.bias))


def _runs_plain(x: Tensor) -> bool:
    """Return whether to run the original forward pass: no backward pass reaches x, or a compiler is tracing."""
    return torch.compiler.is_compiling() or not (needs_backward() and x.requires_grad)


class LeanConvolution(ConvolutionBase):
    """A convolution that saves only its kernel while it is frozen."""

    inplace_norm: InplaceNorm | None = None
    """The pair of this convolution and the norm that may overwrite its output; None if no norm may."""
    recompute: bool = False
    """The argument `recompute` of `prepare_model_for_lean_training`."""

    @property
    def keeps_input(self) -> bool:
        """Whether the weight or bias is trainable, so that the original forward pass runs and saves the input."""
        return _trains(self)

    @property
    def lets_recompute(self) -> bool:
        """Whether `recompute` is set and recomputing the output is cheap. Adapters of this layer read this property."""
        return self.recompute and self.weight[0].numel() <= _MAX_RECOMPUTED_PRODUCTS

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the original layer."""
        if _trains(self):
            return mark_overwritable(super().forward(x), self)
        x, geometry = pad(self, x)
        return mark_overwritable(frozen_convolution(x, self.weight, self.bias, geometry), self)


class LeanBatchNorm(BatchNorm):
    """A BatchNorm that saves one number per channel while it is frozen and in eval mode."""

    @property
    def keeps_input(self) -> bool:
        """Whether the norm saves its input: it is trainable, or normalises by the statistics of the batch."""
        return self.training or self.running_mean is None or _trains(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the original layer."""
        mean, var = self.running_mean, self.running_var
        if self.keeps_input or mean is None or var is None or torch.compiler.is_compiling():
            return super().forward(x)
        x = frozen_batch_norm(x, mean, var, self.weight, self.bias, self.eps, inplace=is_overwritable(x, self))
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x


class LeanClippedActivation(nn.Module):
    """An activation `min(max(x, 0), upper)` that saves a mask, or its output if a consumer saves this output anyway."""

    masks: Masks = "byte"
    consumers: Sequence[ModuleRef] = ()
    """The layers that receive the output."""
    feeds_product: bool = False
    """Whether a product receives the output and therefore saves the output."""
    inplace: bool
    upper = float("inf")

    def kept(self) -> Kept:
        """Return what `forward` saves. If x can be recomputed, `forward` saves a mask unless `masks` is "off"."""
        consumers = [ref.module for ref in self.consumers]
        is_kept_anyway = any(module is not None and layer_keeps_input(module) for module in consumers)
        return "output" if self.masks == "off" or self.feeds_product or is_kept_anyway else self.masks

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the original layer."""
        plain_forward = super().forward
        if _runs_plain(x):
            return plain_forward(x)
        # If x can be recomputed, the consumers save the inputs of the recomputation instead of this output.
        is_recomputed = not get_recompute(x).is_identity
        keep = self.masks if is_recomputed and self.masks != "off" else self.kept()
        return clipped_activation(x, plain_forward, upper=self.upper, keep=keep, inplace=self.inplace)


class LeanSmoothActivation(nn.Module):
    """An activation that saves its input x, or the inputs of the recomputation of x.

    If a backward pass follows, `inplace` is ignored.
    """

    keeps_input = True
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the original layer."""
        if _runs_plain(x):
            return super().forward(x)
        return smooth_activation(x, type(self).function, type(self).derivative)


class LeanGate(nn.Module):
    """A squeeze-excite layer that saves its gate, and either its input x or the inputs of the recomputation of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the original layer."""
        if _runs_plain(x):
            return super().forward(x)
        with _GatedProducts(x):
            return super().forward(x)


class _GatedProducts(TorchFunctionMode):
    """Replaces the product of x and another tensor, the gate, by `gated_product`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func.__name__ in ("mul", "__mul__") and args[0] is self._x and isinstance(args[1], Tensor):
            return gated_product(self._x, args[1])
        return func(*args, **(kwargs or {}))


LEAN: dict[type[nn.Module], type[nn.Module]] = {}
"""Maps original classes to lean classes. Subclasses of an original class are not replaced."""


def _lean_class(lean: type[nn.Module], plain: type[nn.Module], **attributes: object) -> type[nn.Module]:
    """Return a new subclass of the classes `lean` and `plain`, and add the subclass to `LEAN`."""
    # Pickle finds a class by its module and name, so the class must be assigned to its name in this module.
    LEAN[plain] = type(f"Lean{plain.__name__}", (lean, plain), {"__module__": __name__, **attributes})
    return LEAN[plain]


LeanConv1d = _lean_class(LeanConvolution, nn.Conv1d)
LeanConv2d = _lean_class(LeanConvolution, nn.Conv2d)
LeanConv2dSame = _lean_class(LeanConvolution, Conv2dSame)
LeanConv3d = _lean_class(LeanConvolution, nn.Conv3d)
LeanBatchNorm1d = _lean_class(LeanBatchNorm, nn.BatchNorm1d)
LeanBatchNorm2d = _lean_class(LeanBatchNorm, nn.BatchNorm2d)
LeanBatchNorm3d = _lean_class(LeanBatchNorm, nn.BatchNorm3d)
LeanBatchNormAct2d = _lean_class(LeanBatchNorm, BatchNormAct2d)
LeanReLU = _lean_class(LeanClippedActivation, nn.ReLU)
LeanReLU6 = _lean_class(LeanClippedActivation, nn.ReLU6, upper=6.0)
LeanHardswish = _lean_class(
    LeanSmoothActivation, nn.Hardswish, function=F.hardswish, derivative=torch.ops.aten.hardswish_backward
)
LeanSiLU = _lean_class(LeanSmoothActivation, nn.SiLU, function=F.silu, derivative=torch.ops.aten.silu_backward)
LeanSqueezeExcite = _lean_class(LeanGate, SqueezeExcite)
LeanSEModule = _lean_class(LeanGate, SEModule)

PLAIN = {lean: plain for plain, lean in LEAN.items()}
"""Maps lean classes to original classes."""
