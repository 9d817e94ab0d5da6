"""The files that devices run: how each is written, and how it is run here.

Batch normalisation that becomes part of the convolution before it.

The network that is left when an adapter has gone into its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from peft_edge.lean import prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.inplace_norm import InplaceNorm, inplace_norms

INPUT, OUTPUT = "images", "logits"

Network = Callable[[Tensor], Tensor]
"""From images (B, C, H, W) to logits (B, num_classes)."""


class Format(NamedTuple):
    """A kind of file."""

    suffix: str
    """How its name ends, which torch.export and many tools go by."""

    write: Callable[[ExportedProgram, Mapping[str, str], Path], None]
    """Writes an exported network, and texts by their name, to a file."""

    load: Callable[[Path], Network]
    """Makes the file's network ready to run."""

    any_batch_size: bool
    """Whether the file can take batches of any size; else its memory is planned ahead, for one size."""


def import_extra(module: str, extra: str) -> Any:
    """Imports an optional dependency.

    Raises:
        ImportError: It is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{module} is not installed: pip install "peft-edge[{extra}]"') from error


def _write_onnx(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    import_extra("onnxscript", "onnx")
    names: Any = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": ({0: "batch"},)}
    written = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    assert written is not None  # it is None for the exporter that this is not
    written.model.metadata_props.update(texts)
    written.save(file)


def _load_onnx(file: Path) -> Network:
    session = import_extra("onnxruntime", "onnx").InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_torch(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    torch.export.save(program, file, extra_files=dict(texts))


def _load_torch(file: Path) -> Network:
    return torch.export.load(file).module()


def _write_executorch(program: ExportedProgram, texts: Mapping[str, str], file: Path) -> None:
    exir = import_extra("executorch.exir", "executorch")
    xnnpack = import_extra("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    lowered = exir.to_edge_transform_and_lower(
        program, partitioner=[xnnpack.XnnpackPartitioner()], constant_methods=dict(texts)
    )
    file.write_bytes(lowered.to_executorch().buffer)


def _load_executorch(file: Path) -> Network:
    program = import_extra("executorch.runtime", "executorch").Runtime.get().load_program(file)
    method = program.load_method("forward")
    # What it returns lies in memory that the next call uses again.
    return lambda images: method.execute([images])[0].clone()


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _load_onnx, any_batch_size=True),
    "torch-export": Format(".pt2", _write_torch, _load_torch, any_batch_size=True),
    "executorch": Format(".pte", _write_executorch, _load_executorch, any_batch_size=False),
}


def fuse_batch_norms(model: nn.Module) -> None:
    """Puts every BatchNorm that alone takes a convolution's output into that convolution; exact to rounding.

    What stands between others stays: a BatchNorm behind a sum or a concatenation, or one whose convolution's output is
    also used elsewhere. Which these are is what lean training sees, too, when it folds.

    Args:
        model: A plain network in eval mode, nothing of which is trained; changed in place.

    Raises:
        ValueError: The model does not run on images.
    """
    prepare_model_for_lean_training(model, inplace_norm=True)
    pairs = inplace_norms(model)
    undo_lean_training(model)
    names = {module: name for name, module in model.named_modules()}
    for pair in pairs:
        norm = pair.norm.module
        _fuse(pair)
        model.set_submodule(names[norm], _what_is_left(norm))


def _fuse(pair: InplaceNorm) -> None:
    conv, norm = pair.conv.module, pair.norm.module
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _what_is_left(norm: Any) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def merged(model: nn.Module) -> Any:
    """Returns a plain copy of a model in eval mode on the CPU, its active adapters merged with their BatchNorm.

    Args:
        model: A timm model, or a PEFT model of one; left as it is.

    Raises:
        ValueError: An adapter cannot be merged, or its weights are not finite.
    """
    network: Any = copy.deepcopy(model)
    if isinstance(network, PeftModel):
        try:
            network = network.merge_and_unload(safe_merge=True)
        except NotImplementedError as error:
            raise ValueError(
                f"a device runs one plain network, and this adapter cannot become part of one: {error}"
            ) from error
    plain = undo_lean_training(network).cpu().to(memory_format=torch.contiguous_format)
    return plain.eval().requires_grad_(False)
