"""Export an adapted model as one file for a device, and compare the logits of this file with those of the model."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_weights

from peft_edge.backbones import class_names
from peft_edge.export.formats import FORMATS, INPUT, OUTPUT, quantize_onnx
from peft_edge.export.verification import (
    PREPROCESSING_KEYS,
    Comparison,
    compare_logits,
    input_config,
    iter_batches,
    predict_logits,
)
from peft_edge.files import atomic_write
from peft_edge.lean import undo_lean_training
from peft_edge.lean.prepare import fusable_norms

LOGIT_TOLERANCE = 1e-4
METADATA_KEY = "peft_edge"


def export_model(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    format: str,
    images: Tensor,
    labels: Tensor | None = None,
    folders: Sequence[str] = (),
    batch_size: int | None = None,
    calibration: Tensor | None = None,
) -> list[Comparison]:
    """Write a copy of `model` to one file for a device, and compare the file's logits with those of `model`.

    In the copy, the active adapters are merged into the weights, and BatchNorm is fused into the convolutions where
    possible (see `fuse_batch_norms`). The file also contains a JSON text under the name `peft_edge`. This text has the
    names of input and output, the preprocessing of the images, and the class names. In an ONNX file, the text is stored
    as metadata. In a torch.export file, it is an extra file. In an ExecuTorch file, it is the result of a method.

    Args:
        model: A timm model, or a PEFT model with a timm base. It is not changed.
        file: The file to write, with the suffix `.onnx`, `.pt2` or `.pte`. The file is written only if the logits of
            the exported floating-point network (before any quantisation) agree with those of `model`.
        format: `onnx`, `torch-export` or `executorch`.
        images: Preprocessed images (N, C, H, W) for the comparison. The exported network expects this height and width.
        labels: Class indices (N,) of `images`. Without labels, accuracy is not measured.
        folders: For each image, the name of its folder or dataset (N names). With `labels`, the accuracy is then also
            measured for each name. Without `labels`, `folders` has no effect.
        batch_size: The number of images in each call of the exported network. With None, a call accepts any number of
            images, except in the format `executorch`, which fixes the number to 1.
        calibration: Preprocessed images (M, C, H, W). If given, the network is quantised to 8 bits. Only the format
            `onnx` supports this.

    Returns:
        A list with the comparison of the floating-point network with `model`. If the file is quantised, the second
        element is the comparison of the 8-bit network with `model`. The logits of the 8-bit network may differ from
        those of `model` by any amount.

    Raises:
        ValueError: If the format is unknown, does not match the suffix of `file`, or cannot be quantised; if the batch
            size is less than 1; if an adapter cannot be merged; if the model does not run on the images; if a logit is
            not finite; or if a logit of the floating-point network differs from that of `model` by more than
            `LOGIT_TOLERANCE * max(1, largest absolute logit)`.
        ImportError: If the format needs a package that is not installed. The message names the extra of peft-edge that
            installs this package.
        OSError: If the file cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    if calibration is not None and format != "onnx":
        raise ValueError(f"only the format onnx can be quantised to 8 bits, found {format!r}")
    suffix, write, load, any_batch_size = FORMATS[format]
    if Path(file).suffix != suffix:
        raise ValueError(f"{file}: expected a name that ends in {suffix} for the format {format}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    batch_size = batch_size or (None if any_batch_size else 1)
    network = merge_adapters(model)
    config = input_config(network, images.shape[-1])
    preprocessing = {name: config[name] for name in PREPROCESSING_KEYS}
    metadata = {"input": INPUT, "output": OUTPUT, **preprocessing, "class_names": class_names(network)}
    fuse_batch_norms(network)
    try:
        expected = predict_logits(copy.deepcopy(model).cpu().eval(), images, batch_size)
    except RuntimeError as error:
        raise ValueError(f"the model does not run on images of {tuple(images.shape[1:])}: {error}") from error

    # A torch.export file contains `example`. Use zeros, so that no image of the user gets into the file. If any batch
    # size must work, use two images, because from one image torch.export would infer that the batch size is always one.
    example = torch.zeros(batch_size or 2, *images.shape[1:])
    program = torch.export.export(network, (example,), dynamic_shapes=None if batch_size else ({0: Dim("batch")},))
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / f"floats{suffix}"
        write(program, {METADATA_KEY: json.dumps(metadata)}, exported)
        found = predict_logits(load(exported), images, batch_size)
        comparisons = [compare_logits(format, exported.stat().st_size, found, expected, labels, folders)]
        tolerance = LOGIT_TOLERANCE * max(1.0, comparisons[0].largest_logit)
        # The expression `not x <= y` is also True if x is NaN. `x > y` would be False.
        if not comparisons[0].largest_difference <= tolerance or not math.isfinite(comparisons[0].largest_logit):
            raise ValueError(
                f"{format}: expected the logits of the PyTorch model within {tolerance:.1e}, found a difference of "
                f"{comparisons[0].largest_difference:.1e}; no file was written. Export in another format, and report "
                "this error"
            )
        if calibration is not None:
            floats, exported = exported, Path(scratch) / f"integers{suffix}"
            quantize_onnx(floats, exported, iter_batches(calibration, batch_size))
            found = predict_logits(load(exported), images, batch_size)
            size = exported.stat().st_size
            comparisons.append(compare_logits(f"{format} int8", size, found, expected, labels, folders))
        with atomic_write(Path(file)) as unfinished:
            shutil.copyfile(exported, unfinished)
    return comparisons


def merge_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which the active adapters are merged into the weights.

    The copy is on the CPU, frozen and in eval mode. If lean training (`peft_edge.lean`) replaced layers of `model`, the
    copy has the original layers.

    Raises:
        ValueError: If an adapter cannot be merged, or a merged weight is not finite.
    """
    network = copy.deepcopy(model)
    if isinstance(network, PeftModel):
        try:
            network = network.merge_and_unload(safe_merge=True)
        except NotImplementedError as error:
            raise ValueError(f"the adapter cannot be merged into the weights for a device: {error}") from error
    network = undo_lean_training(network).cpu().to(memory_format=torch.contiguous_format)
    return network.eval().requires_grad_(False)


def fuse_batch_norms(model: nn.Module) -> None:
    """Fuse each BatchNorm into the convolution before it, in place, if no other layer uses the convolution's output.

    Outputs are unchanged up to rounding. A BatchNorm remains if its input is a sum, a concatenation, or a convolution
    output that another layer also uses. All BatchNorms remain if the model does not run on torch's meta device, because
    the function runs it there to find out which layers use which outputs. `model` must be in eval mode, without
    adapters and without trainable parameters.
    """
    pairs: list[tuple[Any, Any]] = [*fusable_norms(model)]
    names = {module: name for name, module in model.named_modules()}
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's BatchNormAct2d also contains dropout and an activation, which must remain.
        remainder = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(names[norm], remainder)
