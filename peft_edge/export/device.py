"""Export a training step of an adapter for devices that have only an inference runtime."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge.backbones import change_classes, class_names, fingerprint, head_names
from peft_edge.export.device_states import (
    ADAPTER_FOLDER,
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    PREDICT_NAME,
    PREFIX_NAME,
    PROGRAM_NAME,
    STATE_NAME,
    STEP_NAME,
)
from peft_edge.export.executorch_step import export_train_program
from peft_edge.export.formats import quantize_onnx
from peft_edge.export.onnx_graph import missing_operators, write_onnx_graph
from peft_edge.export.step_checks import Batch, StepReport, check_double, check_single, proof_rate, random_batches
from peft_edge.export.train_step import (
    FEATURES,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    LOGITS,
    MASK,
    NEW,
    CapturedGraph,
    StepOptimizer,
    TrainStep,
    capture_train_step,
    trained_names,
)
from peft_edge.export.verification import PREPROCESSING_KEYS, input_config, iter_batches
from peft_edge.files import atomic_write, requires_extra
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.lean import undo_lean_training
from peft_edge.records import system_info


def export_train_step(
    model: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int,
    batch_size: int = 8,
    format: Literal["onnx", "executorch"] = "onnx",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    classes: Sequence[str] | None = None,
    split: bool = False,
    calibration: Tensor | None = None,
) -> StepReport:
    """Export a training step of an adapter for devices without PyTorch, and compare the step with eager training.

    The function writes these files to the folder `out`:

    - `train_step.onnx`: the training step. The inputs are images, labels, mask, learning rate, adapter and optimizer
      state. The outputs are the loss, the number of correct predictions, and the new adapter and optimizer state. In
      the next step, the output `new:<name>` must replace the input `<name>`.
    - `predict.onnx`: the network. The inputs are the adapter and any number of images. The outputs are the logits.
    - `prefix.onnx` (only with `split`): the frozen layers before the first trained layer. The input is any number of
      images. The outputs are the features of the images. `train_step.onnx` then takes features instead of images.
    - `state.safetensors`: the initial adapter and optimizer state.
    - `step.json`: names, shapes and dtypes of inputs and outputs, size and SHA-256 of the files above, preprocessing,
      class names, optimizer, name and fingerprint (a hash of the weights) of the base model, the fields of
      `StepReport`, a description of the machine that ran the export, and package versions.
    - `adapter`: a folder with the adapter in PEFT's format. `import_state` needs it, but the device does not.

    With `format="executorch"` (experimental), the program `train.pte` replaces the ONNX files. Its methods are
    `train_step`, `predict`, `get_state`, `set_state` and, with `split`, `prefix`. The module `executorch_step`
    describes them.

    BatchNorm uses its stored statistics, on the device and in the comparison. Training on the device therefore does not
    change the statistics, not even those of an adapter with `norm="stats"`. If the model is in training mode and its
    layers use batch statistics or dropout, an error is raised.

    Args:
        model: A PEFT model with one active adapter, or the folder or Hub id of an adapter. The model is not changed.
        out: The folder to write. It is created or replaced only if all checks succeed.
        image_size: Height and width of the images in pixels.
        batch_size: Number of samples in a step. The device must pad smaller batches, and set `mask` to 0 for the
            padding.
        format: The format of the step: `onnx` or `executorch`.
        optimizer: `sgd` (update rule of `torch.optim.SGD`) or `adamw` (update rule of `torch.optim.AdamW`).
        momentum: Momentum of SGD. AdamW ignores this argument.
        weight_decay: Weight decay of SGD or AdamW.
        max_grad_norm: The gradients are clipped so that their total norm is at most this value. With None, gradients
            are not clipped.
        classes: Names of the classes that the device learns; by default the classes of the model. If a listed class is
            a class of the model, the head keeps the row of this class. All other listed classes get new rows.
        split: Whether to write the frozen layers before the first trained layer as a separate file, `prefix.onnx`. The
            device then computes the features of an image only once, and trains on the stored features (latent replay).
        calibration: Preprocessed images (M, C, H, W), only with `split`. If given, `prefix.onnx` and the same layers in
            `predict.onnx` are quantised to 8 bits. The images determine the quantisation scales, and the error
            `StepReport.prefix_error` is measured on them.

    Raises:
        ValueError: If an argument is invalid, a layer or operator cannot be exported, or the exported step differs
            from eager training by more than rounding errors. The folder `out` is then unchanged.
        NotImplementedError: If the step needs the gradient of a transposed convolution, of an average pool with
            padding, or of an average pool whose last window extends beyond the image (`ceil_mode`).
        ImportError: If the packages for `format` are not installed.
        OSError: If the folder cannot be written.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    if format not in ("onnx", "executorch"):
        raise ValueError(f"format: expected onnx or executorch, found {format!r}")
    if calibration is not None and format != "onnx":
        raise ValueError(f"calibration: only a prefix in the format onnx is quantised, found the format {format}")
    if calibration is not None and not split:
        raise ValueError("calibration: only the prefix of a split step is quantised: pass split=True as well")
    if calibration is not None and calibration.shape[2:] != (image_size, image_size):
        raise ValueError(
            f"calibration: expected images of {image_size} x {image_size} pixels, found {tuple(calibration.shape[2:])}"
        )
    packages = ("onnx", "onnxruntime") if format == "onnx" else ("executorch",)
    with requires_extra(format):
        for package in packages:
            import_module(package)  # raises an error early if a package is missing
    options = StepOptimizer(name=optimizer, momentum=momentum, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    if not isinstance(model, PeftModel):
        model = load_pretrained(model)
        model.set_adapter(model.active_adapter)  # makes the adapter trainable
    base = {
        "name": model.peft_config[model.active_adapter].base_model_name_or_path,
        "fingerprint": fingerprint(_without_adapter(model)),
    }
    if classes is not None:
        model = copy.deepcopy(model)
        change_classes(model, classes, generator=torch.Generator().manual_seed(0))
        heads = head_names(model.get_base_model())
        if not any(name.startswith(f"{head}.") for name in trained_names(model).values() for head in heads):
            raise ValueError(f"classes: the head {heads[0]} is not trained: adapt with modules_to_save={heads}")
    config = input_config(model.get_base_model(), image_size)
    step = capture_train_step(model, torch.zeros(batch_size, *config["input_size"]), options, split=split)
    graphs = [graph for graph in (step.step, step.predict, step.prefix) if graph is not None]
    missing = sorted({operator for graph in graphs for operator in missing_operators(graph)})
    if missing and format == "onnx":
        raise ValueError(f"the training step cannot be exported: no ONNX operator is known for {', '.join(missing)}")
    num_classes = step.predict.output_shapes[LOGITS][1]
    if num_classes < 2:
        raise ValueError("the model has one class, so that its loss is always 0: expected at least two classes")
    batches = random_batches(batch_size, config["input_size"], num_classes)
    rate = proof_rate(step, batches[0])
    double_difference = check_double(model, step, options, batches, rate)

    with atomic_write(Path(out)) as unfinished:
        unfinished.mkdir()
        save_file(step.initial_tensors(), unfinished / STATE_NAME)
        if format == "onnx":
            _write_onnx_files(step, unfinished)
            report = check_single(model, step, options, batches, rate, unfinished, double_difference)
        else:
            report = _write_program(step, unfinished / PROGRAM_NAME, batches, rate, double_difference)
        if calibration is not None:
            report = replace(report, prefix_error=_quantize_prefix(step, unfinished, calibration))
        description = _describe_step(model, step, options, config, report)
        description |= {"versions": {name: version(name) for name in ("peft-edge", "torch", "peft", "timm", *packages)}}
        description |= {"base": base, "files": {file.name: _file_entry(file) for file in sorted(unfinished.iterdir())}}
        save_adapter(model, unfinished / ADAPTER_FOLDER)
        (unfinished / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2), encoding="utf-8")
    return report


def _write_onnx_files(step: TrainStep, folder: Path) -> None:
    _write_graph(step.step, folder / STEP_NAME)
    _write_graph(step.predict, folder / PREDICT_NAME, any_batch_size=True)
    if step.prefix is not None:
        _write_graph(step.prefix, folder / PREFIX_NAME, any_batch_size=True)
        _join_prefix(folder, folder / PREDICT_NAME)


def _write_program(
    step: TrainStep, file: Path, batches: Sequence[Batch], rate: float, double_difference: float
) -> StepReport:
    """Write the ExecuTorch program. Return a report with `double_difference` and the measurements of the program."""
    program = export_train_program(step, file, batches, rate)
    return StepReport(
        double_difference=double_difference,
        single_difference=program.difference,
        allowed_difference=program.allowed_difference,
        step_s=program.step_s,
        peak_rss_bytes=None,
        parameters=sum(value.numel() for value in step.adapter.values()),
        arena_bytes=program.arena_bytes,
        xnnpack=program.xnnpack,
    )


def _write_graph(graph: CapturedGraph, file: Path, *, any_batch_size: bool = False) -> None:
    file.write_bytes(write_onnx_graph(graph, any_batch_size=any_batch_size).SerializeToString())


def _join_prefix(folder: Path, tail: Path) -> None:
    """Write `predict.onnx` in `folder`: the graph of `prefix.onnx`, followed by the graph of the file `tail`.

    `prefix.onnx` maps images to features. `tail` maps these features and the adapter to logits. `tail` may be the file
    `predict.onnx` itself.
    """
    import onnx

    model = onnx.load(tail)
    prefix = onnx.compose.add_prefix(onnx.load(folder / PREFIX_NAME), "prefix/", rename_inputs=False)
    prefix.ir_version = model.ir_version
    joined = onnx.compose.merge_models(prefix, model, io_map=[(f"prefix/{FEATURES}", FEATURES)])
    (folder / PREDICT_NAME).write_bytes(joined.SerializeToString())


def _quantize_prefix(step: TrainStep, folder: Path, calibration: Tensor) -> float:
    """Quantise `prefix.onnx` and the same layers in `predict.onnx` to 8 bits. Return the error of the features.

    The features are the outputs of `prefix.onnx`. Their error is ||int8 - float|| / ||float||, where int8 and float are
    the features of all images in `calibration`, with and without quantisation.
    """
    import onnxruntime

    def features() -> Tensor:
        session = onnxruntime.InferenceSession(folder / PREFIX_NAME, providers=["CPUExecutionProvider"])
        found = [session.run([FEATURES], {IMAGES: batch.numpy()})[0] for batch in calibration.split(1)]
        return torch.from_numpy(np.concatenate(found))

    expected = features()
    with tempfile.TemporaryDirectory() as scratch:
        quantized, tail = Path(scratch) / PREFIX_NAME, Path(scratch) / PREDICT_NAME
        quantize_onnx(folder / PREFIX_NAME, quantized, iter_batches(calibration, 1))
        shutil.copyfile(quantized, folder / PREFIX_NAME)
        _write_graph(step.predict, tail, any_batch_size=True)
        _join_prefix(folder, tail)
    return ((features() - expected).norm() / expected.norm()).item()


def _describe_step(
    model: PeftModel, step: TrainStep, optimizer: StepOptimizer, config: Mapping[str, Any], report: StepReport
) -> dict[str, Any]:
    """Return the contents of `step.json`, except `versions`, `base` and `files`, which `export_train_step` adds."""
    shapes = step.step.input_shapes
    images = {IMAGES: (step.prefix or step.predict).input_shapes[IMAGES]}
    # `arena_bytes` is None for ONNX, but not for ExecuTorch, which plans its memory for a fixed batch size.
    any_batch_size = report.arena_bytes is None
    prefix = None
    if step.prefix is not None:
        prefix = {
            "start": step.start,
            "inputs": _batch_shapes(images, any_batch_size),
            "outputs": _batch_shapes(step.prefix.output_shapes, any_batch_size),
            "quantized": report.prefix_error is not None,
        }
    return {
        "format_version": FORMAT_VERSION,
        "inputs": {name: shapes[name] for name in (step.data, LABELS, MASK, LEARNING_RATE)},
        "adapter": {name: shapes[name] for name in step.adapter},
        "state": {name: shapes[name] for name in step.state},
        "outputs": {name: shape for name, shape in step.step.output_shapes.items() if not name.startswith(NEW)},
        "new_prefix": NEW,
        "int64": [LABELS],  # all other tensors are float32
        "predict": {
            "inputs": _batch_shapes(images, any_batch_size),
            "outputs": _batch_shapes(step.predict.output_shapes, any_batch_size),
        },
        "prefix": prefix,
        "preprocessing": {name: config[name] for name in PREPROCESSING_KEYS},
        "class_names": class_names(model.get_base_model()),
        "optimizer": asdict(optimizer),
        "checks": asdict(report),
        "measured_on": system_info(),
    }


def _batch_shapes(shapes: Mapping[str, Sequence[int]], any_batch_size: bool) -> dict[str, list[int | str]]:
    """Return `shapes`. If `any_batch_size` is True, the text "batch" replaces the first dimension of each shape."""
    return {name: ["batch" if any_batch_size else shape[0], *shape[1:]] for name, shape in shapes.items()}


def _file_entry(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _without_adapter(model: PeftModel) -> nn.Module:
    """Return a copy of the base model without the adapter and with the original head."""
    model = copy.deepcopy(undo_lean_training(copy.deepcopy(model)))
    for wrapper in model.modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            wrapper.modules_to_save[model.active_adapter] = wrapper.original_module
    return model.unload()
