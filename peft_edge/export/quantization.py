"""Eight-bit ONNX files, for devices that count in integers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_edge.export.comparison import batches
from peft_edge.export.formats import INPUT, import_extra


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
