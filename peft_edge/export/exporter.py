"""Eight-bit ONNX files, for devices that count in integers.

From an adapted model to one file that a device runs, checked against the model.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from peft_edge.backbones import class_names
from peft_edge.export.formats import FORMATS, INPUT, OUTPUT, fuse_batch_norms, import_extra, merged
from peft_edge.export.verification import Comparison, answers, batches, compare, data_config
from peft_edge.files import atomic_write


def quantize_onnx(file: Path, quantized: Path, images: Tensor, *, batch_size: int | None) -> None:
    """Writes an ONNX file with weights and activations of eight bits (ONNX Runtime's static quantisation).

    Each output channel of a weight has its own scale (Jacob et al., 2018, arXiv 1712.05877); an activation has one,
    from its smallest and largest value on the images. Weights use seven of their eight bits.

    Args:
        file: An ONNX file of floats.
        quantized: Where to.
        images: (N, C, H, W), prepared as the network expects them.
        batch_size: How many images the file takes at once; None for any number.

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    quantization = import_extra("onnxruntime.quantization", "onnx")
    shape_inference = import_extra("onnxruntime.quantization.shape_inference", "onnx")
    inferred = quantized.with_name(f"{quantized.name}.inferred")
    shape_inference.quant_pre_process(file, inferred, skip_symbolic_shape=True)
    quantization.quantize_static(
        inferred,
        quantized,
        _Batches(batches(images, batch_size)),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        # x86 processors without VNNI add two products in 16 bits, where those of full 8-bit weights overflow: a logit
        # can be off by a fifth. One bit less for weights is right on every processor.
        reduce_range=True,
    )


class _Batches:
    """Batches, as ONNX Runtime asks for them."""

    def __init__(self, images: Iterator[Tensor]) -> None:
        self._images = images

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._images, None)
        return None if batch is None else {INPUT: batch.numpy()}


TOLERANCE = 1e-4
METADATA_KEY = "peft_edge"


def export_model(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    format: str,
    images: Tensor,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    calibration: Tensor | None = None,
) -> list[Comparison]:
    """Merges the adapters, fuses BatchNorm into the convolutions, writes one file, and runs that on images.

    The file says in JSON under `peft_edge` how an image becomes its input, and what its outputs are called: in the
    metadata of an ONNX file, as an extra file in torch.export's, and as a method of ExecuTorch's that returns the text.

    Args:
        model: A timm model, or a PEFT model of one; left as it is.
        file: Where to: a name in `.onnx`, `.pt2` or `.pte`. It appears, or is replaced, when all is as it should be.
        format: `onnx`, `torch-export` or `executorch`.
        images: (N, C, H, W), prepared as the model expects them. Their size is that of the file's input.
        labels: (N,), their classes, to see how many are classified right.
        batch_size: How many images the file takes at once. By default any number; with ExecuTorch, which plans its
            memory ahead, one.
        calibration: (M, C, H, W), images to quantise an ONNX file to eight bits with; without, it stays in floats.

    Returns:
        How the file of floats compares with the model, and then the quantised one, if that is what was written.

    Raises:
        ValueError: The format is unknown, has another ending or cannot be quantised; an adapter cannot be merged; the
            model does not run on the images; or the file of floats computes something else than the model: a logit
            differs by more than 1e-4 (of the largest one, above 1).
        ImportError: The format needs a package that is not installed; the message names the extra.
        OSError: The file cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    if calibration is not None and format != "onnx":
        raise ValueError(f"ONNX Runtime quantises, so only the format onnx can be int8, found {format!r}")
    suffix, write, load, any_batch_size = FORMATS[format]
    if Path(file).suffix != suffix:
        raise ValueError(f"{file}: expected a name that ends in {suffix} for the format {format}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    batch_size = batch_size or (None if any_batch_size else 1)
    network = merged(model)
    texts = {METADATA_KEY: json.dumps(_input_and_output(network, images.shape[-1]))}
    fuse_batch_norms(network)
    try:
        expected = answers(copy.deepcopy(model).cpu().eval(), images, batch_size)
    except RuntimeError as error:
        raise ValueError(f"the model does not run on images of {tuple(images.shape[1:])}: {error}") from error

    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / f"floats{suffix}"
        write(_program(network, images, batch_size), texts, exported)
        found = answers(load(exported), images, batch_size)
        compared = [compare(format, exported.stat().st_size, found, expected, labels)]
        _check(compared[0])
        if calibration is not None:
            floats, exported = exported, Path(scratch) / f"integers{suffix}"
            quantize_onnx(floats, exported, calibration, batch_size=batch_size)
            found = answers(load(exported), images, batch_size)
            compared.append(compare(f"{format} int8", exported.stat().st_size, found, expected, labels))
        with atomic_write(Path(file)) as unfinished:
            shutil.copyfile(exported, unfinished)
    return compared


def _input_and_output(network: nn.Module, image_size: int) -> dict[str, Any]:
    """What a device must know to use the network."""
    config = data_config(network, image_size)
    names = ("input_size", "interpolation", "crop_pct", "mean", "std")
    return {
        "input": INPUT,
        "output": OUTPUT,
        # As the training read them: RGB from 0 to 1, then normalised.
        **{name: config[name] for name in names},
        "class_names": class_names(network),
    }


def _program(network: nn.Module, images: Tensor, batch_size: int | None) -> ExportedProgram:
    # No real image, since torch.export's file keeps it. Of a batch of one it would take for granted that it always is.
    example = torch.zeros(batch_size or 2, *images.shape[1:])
    dynamic_shapes = None if batch_size else ({0: Dim("batch")},)
    return torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)


def _check(found: Comparison) -> None:
    tolerance = TOLERANCE * max(1.0, found.largest_logit)
    # A comparison with NaN is always false.
    if not found.largest_difference <= tolerance or not math.isfinite(found.largest_logit):
        raise ValueError(
            f"{found.name}: expected the logits of the PyTorch model to {tolerance:.1e}, found a difference of "
            f"{found.largest_difference:.1e}; no file was written. Export in another format, and report this one"
        )
