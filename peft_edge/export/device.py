"""Export a training step for devices that have only an inference runtime, and import the trained adapter to PEFT."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge.backbones import class_names, fingerprint
from peft_edge.export.exporter import LOGIT_TOLERANCE
from peft_edge.export.onnx_graph import missing_operators, write_onnx_graph
from peft_edge.export.train_step import (
    IMAGES,
    LABELS,
    LEARNING_RATE,
    LOGITS,
    LOSS,
    MASK,
    NEW,
    StepOptimizer,
    TrainStep,
    capture_train_step,
    trained_names,
)
from peft_edge.export.verification import input_config
from peft_edge.files import atomic_write, requires_extra
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.hub.adapter_files import read_json, read_layout
from peft_edge.lean import undo_lean_training

STEP_NAME, PREDICT_NAME, STATE_NAME, DESCRIPTION_NAME = (
    "train_step.onnx",
    "predict.onnx",
    "state.safetensors",
    "step.json",
)
ADAPTER_FOLDER, ORIGIN_NAME = "adapter", "device_training.json"
FORMAT_VERSION = 1

DOUBLE_TOLERANCE = 1e-10
INPUT_CHANGE = 1e-6  # relative change of the images; its effect on the trained adapter measures the rounding errors
ALLOWED_RATIO = 10  # allowed difference over this effect; layers add more rounding errors than the input alone
PROOF_STEPS, PROOF_RATE, PROOF_CHANGE = 4, 0.01, 0.001
# With this `mmap_threshold`, freed memory returns to the system at once. Huge pages then halve the time of a step.
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=65536"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The results of the checks of `export_train_step`.

    Attributes:
        double_difference: Largest difference between the exported step and eager training, both in double precision.
            The losses and the elements of the trained adapter are compared.
        single_difference: Relative difference between the adapters that ONNX Runtime and eager training have trained in
            single precision: the norm of the difference, divided by the norm of the change by eager training.
        allowed_difference: The largest accepted `single_difference`.
        step_s: Seconds of the fastest step in ONNX Runtime on one thread of this machine.
        peak_rss_bytes: Peak physical memory of the process that trained in ONNX Runtime.
        parameters: Number of elements of the adapter.
    """

    double_difference: float
    single_difference: float
    allowed_difference: float
    step_s: float
    peak_rss_bytes: int
    parameters: int


def export_train_step(
    model: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_size: int,
    batch_size: int = 8,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
) -> StepReport:
    """Export a training step of an adapter for devices without PyTorch, and compare the step with eager training.

    The folder contains:

    - `train_step.onnx`: the training step. The inputs are images, labels, mask, learning rate, adapter and optimizer
      state. The outputs are the loss, the number of correct predictions, and the new adapter and optimizer state. In
      the next step, the output `new:<name>` must replace the input `<name>`.
    - `predict.onnx`: the network. The inputs are any number of images and the adapter. The output is the logits.
    - `state.safetensors`: the initial adapter and optimizer state.
    - `step.json`: names and shapes of the inputs, preprocessing, class names, optimizer, fingerprint of the base model,
      the fields of `StepReport`, and package versions.
    - `adapter`: the adapter in PEFT's format. `import_state` needs this folder, but the device does not.

    Args:
        model: A PEFT model with one active adapter, or a folder or Hub id for `load_pretrained`. It is not changed.
        out: The folder to write. It is created or replaced only if all checks succeed.
        image_size: Height and width of the images in pixels.
        batch_size: Samples in a step. The device must pad smaller batches, and set `mask` to 0 for the padding.
        optimizer: `sgd` or `adamw`, as in `torch.optim`.
        momentum: Momentum of SGD. AdamW ignores this argument.
        weight_decay: Weight decay of SGD or AdamW.
        max_grad_norm: Clip the gradients so that their total norm is at most this value. None does not clip.

    Raises:
        ValueError: If an argument is invalid, a layer or operator cannot be exported, or the exported step differs
            from eager training by more than rounding errors. The folder `out` is then unchanged.
        NotImplementedError: If the step needs the gradient of a transposed convolution, of an average pool with
            padding, or of an average pool with `ceil_mode` at an odd size.
        ImportError: If onnx or onnxruntime is not installed.
        OSError: If the folder cannot be written.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    with requires_extra("onnx"):
        import onnx  # noqa: F401 - raises an error early if onnx is missing
        import onnxruntime  # noqa: F401 - a separate process uses it
    options = StepOptimizer(name=optimizer, momentum=momentum, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    if not isinstance(model, PeftModel):
        model = load_pretrained(model)
        model.set_adapter(model.active_adapter)  # makes the adapter trainable
    config = input_config(model.get_base_model(), image_size)
    step = capture_train_step(model, torch.zeros(batch_size, *config["input_size"]), options)
    if missing := sorted({*missing_operators(step.step), *missing_operators(step.predict)}):
        raise ValueError(f"the training step cannot be exported: no ONNX operator is known for {', '.join(missing)}")
    batches = _random_batches(step, batch_size, config["input_size"])
    rate = _proof_rate(step, batches[0])
    double_difference = _check_double(model, step, options, batches, rate)

    with atomic_write(Path(out)) as unfinished:
        unfinished.mkdir()
        for name, graph in ((STEP_NAME, step.step), (PREDICT_NAME, step.predict)):
            written = write_onnx_graph(graph, any_batch_size=graph is step.predict)
            (unfinished / name).write_bytes(written.SerializeToString())
        initial = {name: value.float().contiguous() for name, value in {**step.adapter, **step.state}.items()}
        save_file(initial, unfinished / STATE_NAME)
        report = _check_single(model, step, options, batches, rate, unfinished, double_difference)
        save_adapter(model, unfinished / ADAPTER_FOLDER)
        description = _describe_step(model, step, options, config, report)
        (unfinished / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2), encoding="utf-8")
    return report


def _describe_step(
    model: PeftModel, step: TrainStep, optimizer: StepOptimizer, config: Mapping[str, Any], report: StepReport
) -> dict[str, Any]:
    base = model.get_base_model()
    placeholders = step.step.module.graph.find_nodes(op="placeholder")
    shapes = {name: list(node.meta["val"].shape) for name, node in zip(step.step.inputs, placeholders, strict=True)}
    return {
        "format_version": FORMAT_VERSION,
        "inputs": {name: shapes[name] for name in (IMAGES, LABELS, MASK, LEARNING_RATE)},
        "adapter": {name: shapes[name] for name in step.adapter},
        "state": {name: shapes[name] for name in step.state},
        "new_prefix": NEW,
        "preprocessing": {name: config[name] for name in ("input_size", "interpolation", "crop_pct", "mean", "std")},
        "class_names": class_names(base),
        "optimizer": asdict(optimizer),
        "base": {
            "name": model.peft_config[model.active_adapter].base_model_name_or_path,
            "fingerprint": fingerprint(_without_adapter(model)),
        },
        "checks": asdict(report),
        "versions": {name: version(name) for name in ("peft-edge", "torch", "peft", "timm", "onnx", "onnxruntime")},
    }


def _without_adapter(model: PeftModel) -> nn.Module:
    """Return a copy of the base model without the adapter and with the original head."""
    model = copy.deepcopy(undo_lean_training(copy.deepcopy(model)))
    for wrapper in model.modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            wrapper.modules_to_save[model.active_adapter] = wrapper.original_module
    return model.unload()


# --- checks ---------------------------------------------------------------------------------------------------------

Batch = dict[str, Tensor]


def _random_batches(step: TrainStep, batch_size: int, size: Sequence[int]) -> list[Batch]:
    """Return batches of random images (B, C, H, W), labels and masks. If B > 1, half of the last batch is masked."""
    generator = torch.Generator().manual_seed(0)
    values = {IMAGES: torch.zeros(batch_size, *size, dtype=torch.float64), **step.adapter}
    num_classes = step.predict.run(values)[LOGITS].shape[1]
    batches = []
    for index in range(PROOF_STEPS):
        mask = torch.ones(batch_size)
        if index == PROOF_STEPS - 1:
            mask[(batch_size + 1) // 2 :] = 0
        images = torch.randn(batch_size, *size, generator=generator)
        labels = torch.randint(num_classes, (batch_size,), generator=generator)
        batches.append({IMAGES: images, LABELS: labels, MASK: mask})
    return batches


def train_eagerly(
    model: PeftModel, optimizer: StepOptimizer, batches: Sequence[Batch], learning_rate: float, dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """Train a copy of `model` in eval mode with `torch.optim`, one step for each batch.

    Return the losses, and a dict from the names in the saved adapter to the trained tensors.
    """
    model = undo_lean_training(copy.deepcopy(model)).cpu().to(dtype).eval()
    parameters = dict(model.get_base_model().named_parameters())
    adapter = {name: parameters[inner] for name, inner in trained_names(model).items()}
    values, decay = list(adapter.values()), optimizer.weight_decay
    if optimizer.name == "sgd":
        rule: torch.optim.Optimizer = torch.optim.SGD(
            values, lr=learning_rate, momentum=optimizer.momentum, weight_decay=decay
        )
    else:
        rule = torch.optim.AdamW(values, lr=learning_rate, betas=optimizer.betas, eps=optimizer.eps, weight_decay=decay)
    losses = []
    for batch in batches:
        full = batch[MASK].bool()
        loss = F.cross_entropy(model(batch[IMAGES].to(dtype)[full]), batch[LABELS][full])
        rule.zero_grad()
        loss.backward()
        if optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(values, optimizer.max_grad_norm)
        rule.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in adapter.items()}


def _proof_rate(step: TrainStep, batch: Batch) -> float:
    """Return a learning rate of at most `PROOF_RATE`.

    The first step changes the adapter by at most `PROOF_CHANGE` of the adapter's norm. With a larger learning rate,
    some networks would amplify rounding errors from step to step.
    """
    found = step.step.run(
        {**step.adapter, **step.state, **_double(batch), LEARNING_RATE: torch.tensor(1.0, dtype=torch.float64)}
    )
    change = _norm({name: found[f"{NEW}{name}"] - value for name, value in step.adapter.items()})
    return min(PROOF_RATE, PROOF_CHANGE * _norm(step.adapter) / change)


def _double(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(value.double().square().sum().item() for value in tensors.values()))


def _check_double(
    model: PeftModel, step: TrainStep, optimizer: StepOptimizer, batches: Sequence[Batch], rate: float
) -> float:
    """Return `double_difference` of the report. Raise a ValueError if it exceeds `DOUBLE_TOLERANCE`."""
    expected_losses, expected = train_eagerly(model, optimizer, batches, rate, torch.float64)
    values, losses = {**step.adapter, **step.state}, []
    for batch in batches:
        found = step.step.run({**values, **_double(batch), LEARNING_RATE: torch.tensor(rate, dtype=torch.float64)})
        values = {name: found[f"{NEW}{name}"] for name in values}
        losses.append(found[LOSS].item())
    differences = {name: (values[name] - value).abs().max().item() for name, value in expected.items()}
    differences[LOSS] = max(abs(one - other) for one, other in zip(losses, expected_losses, strict=True))
    worst = max(
        differences, key=lambda name: float("inf") if differences[name] != differences[name] else differences[name]
    )
    if not differences[worst] <= DOUBLE_TOLERANCE:
        raise ValueError(
            f"{worst}: expected the values of eager training in double precision within {DOUBLE_TOLERANCE:.0e}, found "
            f"a difference of {differences[worst]:.1e} after {len(batches)} steps; nothing was written. Report this "
            "error"
        )
    return differences[worst]


def _check_single(
    model: PeftModel,
    step: TrainStep,
    optimizer: StepOptimizer,
    batches: Sequence[Batch],
    rate: float,
    folder: Path,
    double_difference: float,
) -> StepReport:
    """Run the files in `folder` in a new process, and compare the results with eager training in single precision."""
    losses, expected = train_eagerly(model, optimizer, batches, rate, torch.float32)
    found = _run_steps(folder, batches, rate)

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return _norm({name: one[name].double() - other[name].double() for name in expected})

    moved = distance(expected, step.adapter)
    generator = torch.Generator().manual_seed(1)
    natural = 0.0
    for _ in range(2):
        changed = [
            {
                **batch,
                IMAGES: batch[IMAGES] * (1 + INPUT_CHANGE * torch.randn(batch[IMAGES].shape, generator=generator)),
            }
            for batch in batches
        ]
        natural = max(natural, distance(train_eagerly(model, optimizer, changed, rate, torch.float32)[1], expected))
    if not abs(found["losses"][0] - losses[0]) <= LOGIT_TOLERANCE * max(1.0, losses[0]):
        raise ValueError(
            f"{STEP_NAME}: expected the loss {losses[0]:.6f} of eager training in the first step, found "
            f"{found['losses'][0]:.6f}; nothing was written. Report this error"
        )
    difference, allowed = distance(found, expected) / moved, ALLOWED_RATIO * natural / moved
    if not difference <= allowed:
        raise ValueError(
            f"{STEP_NAME}: expected the adapter of eager training within {allowed:.1e} of what training changes, found "
            f"a difference of {difference:.1e} after {len(batches)} steps; nothing was written. Report this error"
        )
    trained = _with_adapter(model, found)
    with torch.no_grad():
        logits = trained(batches[0][IMAGES])
    for name, rows in (("batch", logits), ("single", logits[:1])):
        gap, tolerance = (found[f"logits.{name}"] - rows).abs().max(), LOGIT_TOLERANCE * max(1.0, logits.abs().max())
        if not gap <= tolerance:
            raise ValueError(
                f"{PREDICT_NAME}: expected the logits of the trained model within {tolerance:.1e}, found a difference "
                f"of {gap:.1e} in a batch of {len(rows)}; nothing was written. Report this error"
            )
    return StepReport(
        double_difference=double_difference,
        single_difference=difference,
        allowed_difference=allowed,
        step_s=found["step_s"].item(),
        peak_rss_bytes=int(found["peak_rss_bytes"].item()),
        parameters=sum(value.numel() for value in step.adapter.values()),
    )


def _run_steps(folder: Path, batches: Sequence[Batch], learning_rate: float) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "batches.safetensors", Path(scratch) / "results.safetensors"
        tensors = {f"{name}.{index}": value for index, batch in enumerate(batches) for name, value in batch.items()}
        save_file({**tensors, LEARNING_RATE: torch.tensor(learning_rate)}, inputs)
        script = Path(__file__).with_name("onnx_steps.py")
        command = [sys.executable, "-P", str(script), str(folder), str(inputs), str(outputs)]
        environment = {**os.environ, "GLIBC_TUNABLES": _MALLOC}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"{STEP_NAME}: ONNX Runtime could not run the training step (exit code {ended.returncode}): {last}; "
                "nothing was written. Report this error"
            )
        return load_file(outputs)


def _with_adapter(model: PeftModel, values: Mapping[str, Tensor]) -> PeftModel:
    """Return a copy of `model` in eval mode whose trained parameters have the given values."""
    model = undo_lean_training(copy.deepcopy(model)).cpu().eval()
    parameters = dict(model.get_base_model().named_parameters())
    with torch.no_grad():
        for name, inner in trained_names(model).items():
            parameters[inner].copy_(values[name])
    return model


# --- import to PEFT -------------------------------------------------------------------------------------------------


def import_state(
    folder: str | os.PathLike[str],
    states: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Convert the state files of one or more devices to a PEFT adapter, which `load_pretrained` can load.

    The states of several devices are averaged (FedAvg, McMahan et al. 2017, arXiv 1602.05629). The LoRA matrices A and
    B are averaged separately. Therefore the product of the averages is not exactly the average of the products.

    Args:
        folder: The folder that `export_train_step` wrote.
        states: The safetensors file that a device saved, or a list of such files.
        out: The folder of the adapter. It is created or replaced when all files are complete.
        weights: The weight of each state in the average, such as the number of images on each device. By default, all
            weights are equal.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `step.json` or a state is damaged, a state does not belong to `folder`, an adapter value is not
            finite, or `weights` is invalid.
        OSError: If the adapter cannot be written.
    """
    folder = Path(folder)
    files = [Path(states)] if isinstance(states, str | os.PathLike) else [Path(state) for state in states]
    shares = _shares(files, weights)
    description = read_step_description(folder)
    averages: dict[str, Tensor] = {}
    for file, share in zip(files, shares, strict=True):
        for name, value in read_state(file, description).items():
            averages[name] = averages.get(name, 0) + share * value.double()
    source = folder / ADAPTER_FOLDER
    if not (source / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{source / SAFETENSORS_WEIGHTS_NAME} is missing: copy the whole exported folder here")
    tensors = load_file(source / SAFETENSORS_WEIGHTS_NAME)
    tensors |= {name: averages[name].to(tensors[name].dtype) for name in description["adapter"]}
    origin = {
        "trained_by": STEP_NAME,
        "states": [
            {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "weight": share}
            for file, share in zip(files, shares, strict=True)
        ],
        **{name: description[name] for name in ("base", "optimizer", "versions")},
    }
    with atomic_write(Path(out)) as unfinished:
        shutil.copytree(source, unfinished)
        save_file(tensors, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (unfinished / ORIGIN_NAME).write_text(json.dumps(origin, indent=2), encoding="utf-8")


def _shares(files: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not files:
        raise ValueError("states: expected at least one file, found none")
    weights = [1.0] * len(files) if weights is None else list(weights)
    if len(weights) != len(files):
        raise ValueError(f"weights: expected one for each of the {len(files)} states, found {len(weights)}")
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < float("inf")):
        raise ValueError(f"weights: expected numbers of at least 0 with a positive sum, found {weights}")
    return [weight / total for weight in weights]


def read_step_description(folder: Path) -> dict[str, Any]:
    """Read `step.json` in a folder that `export_train_step` wrote.

    Raises:
        FileNotFoundError: If `step.json` is missing.
        ValueError: If `step.json` is damaged, or has another `format_version`.
    """
    path = folder / DESCRIPTION_NAME
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {folder} was not written by export_train_step") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): export the step again") from error
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        version_found = found.get("format_version") if isinstance(found, dict) else None
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, found {version_found!r}: export it again")
    return found


def read_state(file: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the adapter from the state file of a device. The optimizer state may be missing from the file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, an adapter tensor is missing, a tensor is unknown or has another shape or
            dtype, or an adapter value is not finite.
    """
    layout = read_layout(file)
    adapter = {name: tuple(shape) for name, shape in description["adapter"].items()}
    known = adapter | {name: tuple(shape) for name, shape in description["state"].items()}
    problems = [f"{name} is missing" for name in adapter if name not in layout]
    for name, (shape, dtype) in layout.items():
        if name not in known:
            problems.append(f"{name} is unknown")
        elif shape != known[name] or dtype != torch.float32:
            problems.append(f"{name}: expected torch.float32 {known[name]}, found {dtype} {shape}")
    if not problems:
        tensors = load_file(file)
        problems = [
            f"{name} holds values that are not finite" for name in adapter if not tensors[name].isfinite().all()
        ]
    if problems:
        raise ValueError(
            f"{file} is not a state of this training step: {problems[0]}"
            + (f"; {len(problems)} problems in all" if len(problems) > 1 else "")
            + ". Pass the folder that the device trains with, and a state that it saved"
        )
    return {name: tensors[name] for name in adapter}
