"""Layers that save only what their backward pass needs.

Each lean class extends one class of torch or timm. `prepare_model_for_lean_training` changes the class of a module, and
`undo_lean_training` restores the class. In compiled models, only frozen convolutions are lean. All other layers run the
original forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, SEModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_edge._compat import (
    BatchNorm,
    ConvolutionBase,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
    is_in_backward,
)
from peft_edge.functional.activations import (
    Activation,
    Derivative,
    Kept,
    clipped_activation,
    gated_product,
    max_pool2d,
    silu_gradient,
    smooth_activation,
)
from peft_edge.functional.batch_norm import batch_norm, frozen_batch_norm
from peft_edge.functional.convolution import lean_convolution, needs_backward, pad
from peft_edge.functional.recompute import get_recompute
from peft_edge.lean.inplace_norm import InplaceNorm, ModuleRef, exposes_tensors, is_overwritable, mark_overwritable
from peft_edge.roles import is_depthwise

Function = Callable[..., object]

Masks = Literal["byte", "bit", "off"]
"""What a clipped activation such as ReLU saves: a mask of one byte or one bit per element, or with "off" its output."""

Recomputed = bool | Literal["depthwise"]
"""The convolutions whose outputs are recomputed: none (False), the depthwise ones, or all cheap ones (True)."""

# The output of a convolution is recomputed only if the convolution takes at most this many products per output element.
_MAX_RECOMPUTED_PRODUCTS = 100

# With `split_blocks`, the largest feature map inside a block has about this many elements. On the measured CPUs,
# smaller parts of the batch were not faster.
_MAX_BLOCK_ELEMENTS = 1 << 22

# torch's pooling layers save their input, even if they need only its shape.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def layer_keeps_input(module: nn.Module) -> bool:
    """Return whether a layer saves its input.

    The attribute `keeps_input` of the layer states this. If the attribute is missing or None, the result is an
    estimate.
    """
    known = getattr(module, "keeps_input", None)
    if known is not None:
        return known
    return isinstance(module, _POOLS) or any(parameter.requires_grad for parameter in module.parameters())


def _trains(layer: ConvolutionBase | BatchNorm) -> bool:
    """Return whether the weight or the bias of a layer is trainable."""
    # Do not use `parameters()`, because a weight that a parametrisation computes is not a parameter.
    return any(value is not None and value.requires_grad for value in (layer.weight, layer.bias))


def _runs_plain(x: Tensor) -> bool:
    """Return whether the original forward pass runs. It runs if a compiler is tracing or no backward pass reaches x."""
    return torch.compiler.is_compiling() or not (needs_backward() and x.requires_grad)


class LeanConvolution(ConvolutionBase):
    """A convolution that, while frozen, saves only its kernel for the backward pass.

    With a trainable kernel, it also saves its input x. If x can be recomputed from other tensors, it saves these
    tensors instead of x.
    """

    inplace_norm: InplaceNorm | None = None
    """References to this convolution and to the norm that may overwrite its output. None if there is no such norm."""
    recompute: Recomputed = False
    """The argument `recompute` of `prepare_model_for_lean_training`."""

    @property
    def keeps_input(self) -> bool:
        """Whether the layer may save its input. It may do so if its weight or bias is trainable."""
        return _trains(self)

    @property
    def lets_recompute(self) -> bool:
        """Whether the output is recomputed in the backward pass instead of saved.

        Adapters of this layer read this property.
        """
        if self.recompute == "depthwise":
            return is_depthwise(self)
        return self.recompute and self.weight[0].numel() <= _MAX_RECOMPUTED_PRODUCTS

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        is_batch = x.dim() == self.weight.dim()
        if not is_batch or (torch.compiler.is_compiling() and _trains(self)):
            return super().forward(x)
        x, geometry = pad(self, x)
        y = lean_convolution(x, self.weight, self.bias, geometry, recompute=self.lets_recompute)
        return mark_overwritable(y, self)


class LeanBatchNorm(BatchNorm):
    """A BatchNorm that lets later layers recompute its output from its input.

    A frozen BatchNorm in eval mode saves no input.

    If gradient checkpointing repeats a forward pass in training mode, only the first pass updates the statistics.
    """

    @property
    def keeps_input(self) -> bool:
        """Whether the norm saves its input. It does if it is trainable or normalises by the statistics of the batch."""
        return self.training or self.running_mean is None or _trains(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        mean, var = self.running_mean, self.running_var
        trains = _trains(self)
        is_constant = not (self.training or trains or mean is None or var is None)
        has_backward = needs_backward() and (x.requires_grad or trains)
        # Checkpointing may repeat this forward pass in a backward pass. `super().forward` would then count the batch
        # again.
        if not (is_constant or has_backward or is_in_backward()):
            return super().forward(x)
        inplace = is_overwritable(x, self)
        if self.training or mean is None or var is None:
            counts = self.training and self.track_running_stats and not is_in_backward()
            x = batch_norm(
                x,
                mean if counts else None,
                var if counts else None,
                self.weight,
                self.bias,
                training=True,
                momentum=self._count_batch() if counts else 0.0,
                eps=self.eps,
                inplace=inplace,
            )
        elif trains:
            x = batch_norm(
                x, mean, var, self.weight, self.bias, training=False, momentum=0.0, eps=self.eps, inplace=inplace
            )
        else:
            x = frozen_batch_norm(x, mean, var, self.weight, self.bias, self.eps, inplace=inplace)
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x

    def _count_batch(self) -> float:
        """Count a batch, and return the weight of the batch in the running statistics.

        The weight is `momentum`. If `momentum` is None, the weight is 1 / (number of batches). If
        `num_batches_tracked` is also None, the weight is 0.
        """
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1.0 / float(self.num_batches_tracked)


class LeanClippedActivation(nn.Module):
    """An activation `min(max(x, 0), upper)` that saves a mask, or its output if another layer also saves it."""

    masks: Masks = "byte"
    consumers: Sequence[ModuleRef] = ()
    """References to the layers that receive the output."""
    feeds_product: bool = False
    """Whether the output is a factor of a product, for example with a gate. A product saves its factors."""
    inplace: bool
    function: Activation
    upper: float

    def kept(self) -> Kept:
        """Return what `forward` saves if its input cannot be recomputed: the output or a mask."""
        consumers = [ref.module for ref in self.consumers]
        is_kept_anyway = any(module is not None and layer_keeps_input(module) for module in consumers)
        return "output" if self.masks == "off" or self.feeds_product or is_kept_anyway else self.masks

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        if _runs_plain(x):
            return super().forward(x)
        # If x can be recomputed, the next layers recompute the output of this layer instead of saving it. The output
        # would then be saved only for the backward pass of this layer, which can use a mask. A mask takes less memory.
        is_recomputed = not get_recompute(x).is_identity
        keep = self.masks if is_recomputed and self.masks != "off" else self.kept()
        return clipped_activation(x, type(self).function, upper=self.upper, keep=keep, inplace=self.inplace)


class LeanSmoothActivation(nn.Module):
    """An activation that saves its input x.

    If x can be recomputed from other tensors, the layer saves these tensors instead of x.
    """

    keeps_input = True
    inplace: bool
    function: Activation
    derivative: Derivative

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        if _runs_plain(x):
            return super().forward(x)
        return smooth_activation(x, type(self).function, type(self).derivative, inplace=self.inplace)


class LeanMaxPool(nn.MaxPool2d):
    """A max-pooling that saves its input x, but no indices.

    If x can be recomputed from other tensors, the layer saves these tensors instead of x. With `return_indices`, it
    runs the original forward pass.
    """

    keeps_input = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        if _runs_plain(x) or self.return_indices:
            return super().forward(x)
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        return max_pool2d(x, *([size] * 2 if isinstance(size, int) else size for size in sizes), self.ceil_mode)


class LeanBlock(nn.Module):
    """An inverted residual block that runs on a few samples at a time, if its feature maps are large.

    The block expands its input to several times as many channels. If no layer of the block mixes samples, the block can
    run on one part of the batch after another. Only one part of the expanded feature map is then in memory, in the
    forward pass and in the backward pass. The outputs of the parts are concatenated.

    BatchNorm in training mode mixes samples, and dropout draws different random numbers for parts than for the whole
    batch. In these cases, or if a layer has a hook, which would see only a part, the block runs on the whole batch.
    """

    split_blocks: bool = False
    """The argument `split_blocks` of `prepare_model_for_lean_training`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `super().forward(x)`, computed for one part of the batch after another, if possible."""
        forward = super().forward
        if (num_parts := self._num_parts(x)) <= 1:
            return forward(x)
        samples, larger = divmod(len(x), num_parts)
        sizes = [samples + 1] * larger + [samples] * (num_parts - larger)
        return torch.cat([forward(part) for part in x.split(sizes)])

    def _num_parts(self, x: Tensor) -> int:
        """Return the number of parts into which `forward` splits the batch x."""
        if not self.split_blocks or torch.compiler.is_compiling() or not needs_backward():
            return 1
        channels = max((conv.out_channels for conv in self.modules() if isinstance(conv, nn.Conv2d)), default=0)
        num_parts = min(math.ceil(channels * x[:, 0].numel() / _MAX_BLOCK_ELEMENTS), len(x))
        return 1 if num_parts > 1 and any(map(_needs_whole_batch, self.children())) else num_parts


def _needs_whole_batch(module: nn.Module) -> bool:
    """Return whether a module mixes samples, or draws random numbers, or has a hook that observes its tensors."""
    if exposes_tensors(module) or _is_random(module):
        return True
    # The BatchNorm layers of this package's adapters state which statistics they use.
    if (uses_batch_statistics := getattr(module, "uses_batch_statistics", None)) is not None:
        return uses_batch_statistics or any(exposes_tensors(each) or _is_random(each) for each in module.modules())
    # All layers with running statistics have `running_var`.
    mixes = hasattr(module, "running_var") and (module.training or module.running_var is None)
    return mixes or any(map(_needs_whole_batch, module.children()))


def _is_random(module: nn.Module) -> bool:
    """Return whether a module draws random numbers in its current mode."""
    # These are the attributes for probabilities in the layers of torch and timm, and in PEFT's LoHa and LoKr. PEFT's
    # layers have dicts from adapter to probability.
    names = ("p", "drop_prob", "dropout", "rank_dropout", "module_dropout")
    values = [value for value in (getattr(module, name, None) for name in names) if value is not None]
    numbers = [number for value in values for number in (value.values() if isinstance(value, dict) else [value])]
    has_probability = any(isinstance(number, (int, float)) and number > 0 for number in numbers)
    return module.training and (has_probability or isinstance(module, nn.RReLU))


class LeanGate(nn.Module):
    """A squeeze-excite layer that saves its gate, and its input x.

    If x can be recomputed from other tensors, the layer saves these tensors instead of x.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the same output as `super().forward(x)`, but save less for the backward pass, if possible."""
        if _runs_plain(x):
            return super().forward(x)
        with _GatedProducts(x):
            return super().forward(x)


class _GatedProducts(TorchFunctionMode):
    """In a `with` block, replaces a product of x and another tensor (the gate) by `gated_product`."""

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
"""A dict from original classes to lean classes. Subclasses of an original class are not replaced."""


def _lean_class(lean: type[nn.Module], plain: type[nn.Module], **attributes: object) -> type[nn.Module]:
    """Return a new subclass of `lean` and `plain`, and register it in `LEAN` as the lean class of `plain`."""
    # Pickle looks up the class by name in this module, so the caller must assign the class to a variable of this name.
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
LeanReLU = _lean_class(LeanClippedActivation, nn.ReLU, function=F.relu, upper=float("inf"))
LeanReLU6 = _lean_class(LeanClippedActivation, nn.ReLU6, function=F.relu6, upper=6.0)
LeanHardswish = _lean_class(
    LeanSmoothActivation, nn.Hardswish, function=F.hardswish, derivative=torch.ops.aten.hardswish_backward
)
LeanSiLU = _lean_class(LeanSmoothActivation, nn.SiLU, function=F.silu, derivative=silu_gradient)
LeanMaxPool2d = _lean_class(LeanMaxPool, nn.MaxPool2d)
LeanSqueezeExcite = _lean_class(LeanGate, SqueezeExcite)
LeanSEModule = _lean_class(LeanGate, SEModule)
LeanInvertedResidual = _lean_class(LeanBlock, InvertedResidual)
LeanUniversalInvertedResidual = _lean_class(LeanBlock, UniversalInvertedResidual)
LeanEdgeResidual = _lean_class(LeanBlock, EdgeResidual)

PLAIN = {lean: plain for plain, lean in LEAN.items()}
"""A dict from lean classes to original classes."""
