"""Write, load and quantise an exported network in the file formats for devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from peft_edge.files import requires_extra

INPUT, OUTPUT = "images", "logits"

Network = Callable[[Tensor], Tensor]
"""A function from images (B, C, H, W) to logits (B, num_classes)."""


class Format(NamedTuple):
    """A file format for exported networks.

    Attributes:
        suffix: The suffix that a file name must have.
        write: A function that writes an exported network and metadata (a dict from names to texts) to a file.
        load: A function that reads a file, and returns its network as a function from images to logits.
        any_batch_size: Whether the network in a file can accept batches of any size. Otherwise, the batch size is fixed
            at export.
    """

    suffix: str
    write: Callable[[ExportedProgram, Mapping[str, str], Path], None]
    load: Callable[[Path], Network]
    any_batch_size: bool


def _write_onnx(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    with requires_extra("onnx"):
        import onnxscript  # noqa: F401 - raises an error early; `torch.onnx.export` needs onnxscript
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: "batch"},)
    )
    assert written is not None  # `torch.onnx.export` returns None only with dynamo=False
    written.model.metadata_props.update(texts)
    written.save(file)


def _load_onnx(file: Path) -> Network:
    with requires_extra("onnx"):
        from onnxruntime import InferenceSession
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_torch(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    torch.export.save(program, file, extra_files=dict(texts))


def _write_executorch(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    with requires_extra("executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=dict(texts))
    file.write_bytes(lowered.to_executorch().buffer)


def _load_executorch(file: Path) -> Network:
    with requires_extra("executorch"):
        from executorch.runtime import Runtime
    method = Runtime.get().load_program(file).load_method("forward")
    # Clone the output, because the next call of `execute` overwrites the memory of the output.
    return lambda images: method.execute([images])[0].clone()


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _load_onnx, any_batch_size=True),
    "torch-export": Format(".pt2", _write_torch, lambda file: torch.export.load(file).module(), any_batch_size=True),
    "executorch": Format(".pte", _write_executorch, _load_executorch, any_batch_size=False),
}


def quantize_onnx(file: Path, quantized: Path, batches: Iterable[Tensor]) -> None:
    """Write an 8-bit copy of the ONNX file `file` to `quantized`, with ONNX Runtime's static quantisation.

    Weights use 7 of the 8 bits, and have one scale per output channel (Krishnamoorthi 2018, arXiv 1806.08342). Each
    activation tensor has one scale, which is computed from the values of this tensor when the network runs on
    `batches`. Each batch contains preprocessed images (B, C, H, W).
    """
    with requires_extra("onnx"):
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    inputs = ({INPUT: batch.numpy()} for batch in batches)
    inferred = quantized.with_name(f"{quantized.name}.inferred")
    shape_inference.quant_pre_process(file, inferred, skip_symbolic_shape=True)
    quantization.quantize_static(
        inferred,
        quantized,
        SimpleNamespace(get_next=lambda: next(inputs, None)),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        # x86 processors without VNNI add two products in 16 bits. With 8-bit weights, this sum can overflow, which can
        # change a logit by 20 %. With 7-bit weights, the sum cannot overflow.
        reduce_range=True,
    )
