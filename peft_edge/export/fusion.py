"""Batch normalisation that becomes part of the convolution before it."""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from peft_edge.lean import prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.folding import FoldedNorm, folded_norms


def fuse_batch_norms(model: nn.Module) -> None:
    """Puts every BatchNorm that alone takes a convolution's output into that convolution; exact to rounding.

    What stands between others stays: a BatchNorm behind a sum or a concatenation, or one whose convolution's output is
    also used elsewhere. Which these are is what lean training sees, too, when it folds.

    Args:
        model: A plain network in eval mode, nothing of which is trained; changed in place.

    Raises:
        ValueError: The model does not run on images.
    """
    prepare_model_for_lean_training(model, fold_norm=True)
    pairs = folded_norms(model)
    undo_lean_training(model)
    names = {module: name for name, module in model.named_modules()}
    for pair in pairs:
        norm = pair.norm.module
        _fuse(pair)
        model.set_submodule(names[norm], _what_is_left(norm))


def _fuse(pair: FoldedNorm) -> None:
    conv, norm = pair.conv.module, pair.norm.module
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _what_is_left(norm: Any) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
