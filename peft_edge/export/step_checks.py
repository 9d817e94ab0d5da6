"""Compare an exported training step with eager training.

`check_double` compares the captured graph in double precision. `check_single` runs the ONNX files in ONNX Runtime, and
compares their results in single precision.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge.export.device_states import PREDICT_NAME, STEP_NAME
from peft_edge.export.exporter import LOGIT_TOLERANCE
from peft_edge.export.train_step import (
    FEATURES,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    LOSS,
    MASK,
    NEW,
    StepOptimizer,
    TrainStep,
    trained_names,
)
from peft_edge.lean import undo_lean_training

DOUBLE_TOLERANCE = 1e-10
# In single precision, the check also trains with images that it changes by this relative amount. The effect of the
# change on the trained adapter measures how much training amplifies rounding errors.
INPUT_CHANGE = 1e-6
# The exported step may differ from eager training by at most `ALLOWED_RATIO` times this effect. In 26 exports of four
# networks (32 to 224 px) with SGD, the difference was 0.4 to 1.5 times the effect. The limit of 3 is twice the largest
# ratio. In five exports with AdamW, the ratio was 0.03 to 4.4. The ratio of 4.4 was that of a tiny network with batch
# size 2. AdamW divides by the size of the gradient, and so amplifies the rounding errors of gradients near 0.
ALLOWED_RATIO = {"sgd": 3, "adamw": 5}
# A rounding error that flips the sign of an activation near 0 has a large effect. A single random change of the images
# may flip no sign. Its effect is then small, and sets too strict a limit. The check therefore tries up to
# `INPUT_CHANGES` random changes, and stops at a change whose effect is large enough to allow the difference.
INPUT_CHANGES = 8
# `PROOF_STEPS` is the number of steps of the check. `proof_rate` explains the other two constants.
PROOF_STEPS, PROOF_RATE, PROOF_CHANGE = 4, 0.01, 0.001
# With this `mmap_threshold`, glibc immediately returns freed blocks of at least 64 KiB to the system. `hugetlb=1`
# switches on huge pages, which halve the time of a step.
MALLOC_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=65536"

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The results of the checks of `export_train_step`.

    Attributes:
        double_difference: Largest absolute difference between the captured step and eager training in double
            precision, over the losses and all elements of the trained adapter.
        single_difference: Relative difference between two trained adapters: ||exported - eager|| / ||eager - initial||.
            `initial` is the adapter before training. `exported` is the adapter that the runtime has trained in single
            precision. `eager` is the adapter that PyTorch has trained. For ONNX, PyTorch trains eagerly in single
            precision. For ExecuTorch, PyTorch trains with the captured graph in double precision.
        allowed_difference: The largest accepted `single_difference`.
        step_s: Seconds of the fastest step in the runtime on this machine. ONNX Runtime uses one thread.
        peak_rss_bytes: Peak physical memory in bytes of the process that trained in ONNX Runtime. None for ExecuTorch.
        parameters: Number of trained parameters.
        prefix_error: If the prefix (the frozen layers before the first trained layer) is quantised to 8 bits, the
            relative error of its outputs, that is, the norm of the error divided by the norm of the outputs. None if
            the prefix is not quantised.
        arena_bytes: For ExecuTorch, a dict from the name of each method to the sizes of its memory arenas in bytes. An
            arena is memory that the program plans in advance. All methods share the last arena, which contains the
            adapter and the optimizer state. None for ONNX.
        xnnpack: For ExecuTorch, whether XNNPACK, a CPU library, computes the operators that it supports. None for ONNX.
    """

    double_difference: float
    single_difference: float
    allowed_difference: float
    step_s: float
    peak_rss_bytes: int | None
    parameters: int
    prefix_error: float | None = None
    arena_bytes: dict[str, list[int]] | None = None
    xnnpack: bool | None = None


def report_lines(report: StepReport) -> str:
    """Return the report as a text with one line for each result."""
    lines = [
        f"double precision: within {report.double_difference:.0e} of PyTorch",
        f"single precision, in a process of its own: {report.single_difference:.1e} of the change by training "
        f"(allowed {report.allowed_difference:.1e})",
        f"fastest step: {1000 * report.step_s:,.1f} ms on one thread",
        f"adapter: {report.parameters:,} parameters",
    ]
    if report.peak_rss_bytes is not None:
        lines.append(f"peak memory of the process: {report.peak_rss_bytes / 2**20:,.1f} MiB")
    if report.arena_bytes is not None:
        arenas = ", ".join(f"{name} {sum(sizes) / 2**10:,.0f} KiB" for name, sizes in report.arena_bytes.items())
        lines.append(f"planned memory, {'with' if report.xnnpack else 'without'} XNNPACK: {arenas}")
    if report.prefix_error is not None:
        lines.append(f"8-bit prefix: relative error of the features {report.prefix_error:.1e}")
    return "\n".join(lines)


def random_batches(batch_size: int, size: Sequence[int], num_classes: int) -> list[Batch]:
    """Return `PROOF_STEPS` batches of random images (B, *size), labels and masks.

    B is `batch_size`. The last B // 2 samples of the last batch are padding (mask 0).
    """
    generator = torch.Generator().manual_seed(0)
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

    Samples with mask 0 are left out. Return the losses, and a dict from the names in the saved adapter to the trained
    tensors.
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


def proof_rate(step: TrainStep, batch: Batch) -> float:
    """Return a learning rate for comparing `step` with eager training. It is at most `PROOF_RATE`.

    With this learning rate, the first step changes the adapter by at most `PROOF_CHANGE` times the norm of the adapter.
    With a larger learning rate, some networks would amplify rounding errors from step to step.
    """
    found = step.step.run(
        {**step.adapter, **step.state, **_double(step, batch), LEARNING_RATE: torch.tensor(1.0, dtype=torch.float64)}
    )
    change = _norm({name: found[f"{NEW}{name}"] - value for name, value in step.adapter.items()})
    return min(PROOF_RATE, PROOF_CHANGE * _norm(step.adapter) / change)


def _double(step: TrainStep, batch: Batch) -> Batch:
    """Return `batch` in double precision. If `step` takes features instead of images, add the features to the batch."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return {**double, step.data: step.features(double[IMAGES])}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the norm over all elements of all tensors, computed in double precision."""
    return math.sqrt(sum(value.double().square().sum().item() for value in tensors.values()))


def check_double(
    model: PeftModel, step: TrainStep, optimizer: StepOptimizer, batches: Sequence[Batch], rate: float
) -> float:
    """Compare the captured step with eager training in double precision. Return `StepReport.double_difference`.

    Raises:
        ValueError: If the difference exceeds `DOUBLE_TOLERANCE` or is NaN.
    """
    expected_losses, expected = train_eagerly(model, optimizer, batches, rate, torch.float64)
    values, losses = {**step.adapter, **step.state}, []
    for batch in batches:
        found = step.step.run(
            {**values, **_double(step, batch), LEARNING_RATE: torch.tensor(rate, dtype=torch.float64)}
        )
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


def check_single(
    model: PeftModel,
    step: TrainStep,
    optimizer: StepOptimizer,
    batches: Sequence[Batch],
    rate: float,
    folder: Path,
    double_difference: float,
) -> StepReport:
    """Run the ONNX files in `folder` in new processes. Compare the results with eager training in single precision.

    Return a report in which `prefix_error` is None. `double_difference` is the result of `check_double`. It is copied
    into the report.

    Raises:
        ValueError: If ONNX Runtime cannot run a file, or a result differs from eager training by more than rounding
            errors can explain.
    """
    losses, expected = train_eagerly(model, optimizer, batches, rate, torch.float32)
    if step.prefix is not None:
        features = run_onnx_steps(folder, batches, rate, mode="features")
        inputs = [{**batch, FEATURES: features[f"{FEATURES}.{index}"]} for index, batch in enumerate(batches)]
        found = run_onnx_steps(folder, inputs, rate)
    else:
        found = run_onnx_steps(folder, batches, rate)

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return _norm({name: one[name].double() - other[name].double() for name in expected})

    moved = distance(expected, step.adapter)
    if not abs(found["losses"][0] - losses[0]) <= LOGIT_TOLERANCE * max(1.0, losses[0]):
        raise ValueError(
            f"{STEP_NAME}: expected the loss {losses[0]:.6f} of eager training in the first step, found "
            f"{found['losses'][0]:.6f}; nothing was written. Report this error"
        )
    difference, allowed = distance(found, expected) / moved, 0.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(INPUT_CHANGES):
        changed = [
            {
                **batch,
                IMAGES: batch[IMAGES] * (1 + INPUT_CHANGE * torch.randn(batch[IMAGES].shape, generator=generator)),
            }
            for batch in batches
        ]
        effect = distance(train_eagerly(model, optimizer, changed, rate, torch.float32)[1], expected) / moved
        allowed = max(allowed, ALLOWED_RATIO[optimizer.name] * effect)
        if difference <= allowed:
            break
    else:
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


def run_onnx_steps(
    folder: Path, batches: Sequence[Batch], learning_rate: float, *, mode: Literal["train", "features"] = "train"
) -> dict[str, Tensor]:
    """Run the script `onnx_steps.py` in a new process on the ONNX files in `folder`. Return the tensors that it writes.

    With the mode `train`, the script takes one training step for each batch. With the mode `features`, it computes the
    features of the images, which are the outputs of the frozen layers before the first trained layer.

    Raises:
        ValueError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "batches.safetensors", Path(scratch) / "results.safetensors"
        tensors = {f"{name}.{index}": value for index, batch in enumerate(batches) for name, value in batch.items()}
        save_file({**tensors, LEARNING_RATE: torch.tensor(learning_rate)}, inputs)
        script = Path(__file__).with_name("onnx_steps.py")
        # With -P, Python does not search the folder of the script for modules. Python 3.10 lacks this option.
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []
        command = [sys.executable, *safe_path, str(script), mode, str(folder), str(inputs), str(outputs)]
        environment = {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"{STEP_NAME}: ONNX Runtime could not run the training step (exit code {ended.returncode}): {last}; "
                "nothing was written. Report this error"
            )
        return load_file(outputs)


def _with_adapter(model: PeftModel, values: Mapping[str, Tensor]) -> PeftModel:
    """Return a copy of `model` in eval mode, with the trained parameters set to `values`."""
    model = undo_lean_training(copy.deepcopy(model)).cpu().eval()
    parameters = dict(model.get_base_model().named_parameters())
    with torch.no_grad():
        for name, inner in trained_names(model).items():
            parameters[inner].copy_(values[name])
    return model
