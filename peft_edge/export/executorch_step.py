"""Write a captured training step as an ExecuTorch program (experimental).

The methods of the program share the buffers of the adapter and the optimizer state:

- `train_step(images, labels, mask, learning_rate)` changes the adapter and the optimizer state, and returns the loss
  and the number of correct predictions.
- `predict(images)` returns the logits.
- `prefix(images)` exists only if the step was captured with `split=True`. It returns features, which are the outputs
  of the frozen first layers. `train_step` then takes features instead of images.
- `get_state()` returns the adapter and the optimizer state, in the order of `TrainProgram.state_names`.
- `set_state(...)` takes tensors in the same order, and replaces the adapter and the optimizer state by these tensors.

ExecuTorch's interface for mutable state may still change. Load a program with the version of ExecuTorch that wrote it.

`python -m peft_edge.export.executorch_step PROGRAM BATCHES OUT` calls `run_program` in a separate process, because a
program may crash its process. BATCHES is a safetensors file with the argument `batches` of `run_program`. OUT is the
safetensors file for the result of `run_program`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from peft_edge.export.exporter import LOGIT_TOLERANCE
from peft_edge.export.step_checks import Batch
from peft_edge.export.train_step import (
    CORRECT,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    LOGITS,
    LOSS,
    MASK,
    NEW,
    CapturedGraph,
    TrainStep,
)
from peft_edge.files import requires_extra

ALLOWED_RATIO = 10  # the program's error may be at most this many times the error of PyTorch in single precision
FLOOR = 1e-6  # a relative error (`TrainProgram.difference`) of at most this value is always allowed
_BUFFER = "state_"  # prefix of the names of the buffers that hold the adapter and the optimizer state


@dataclass(frozen=True, kw_only=True)
class TrainProgram:
    """The description of an ExecuTorch program that `export_train_program` wrote.

    Attributes:
        state_names: Names of the tensors that `get_state` returns and `set_state` takes.
        xnnpack: Whether XNNPACK, a CPU library, computes the operators that it supports.
        arena_bytes: For each method name, a list of the sizes of the method's memory arenas in bytes. The last arena
            contains the adapter and the optimizer state. All methods share this arena.
        step_s: Seconds of the fastest training step when the program was checked.
        difference: Relative error of the trained adapter: ||trained - exact|| / ||exact - initial||. `trained` is the
            adapter that the program has trained. `exact` is the adapter after the same training in PyTorch with double
            precision, and `initial` is the adapter before the training.
        allowed_difference: The largest accepted `difference`.
    """

    state_names: list[str]
    xnnpack: bool
    arena_bytes: dict[str, list[int]]
    step_s: float
    difference: float
    allowed_difference: float


def export_train_program(step: TrainStep, file: Path, batches: Sequence[Batch], learning_rate: float) -> TrainProgram:
    """Write a training step as an ExecuTorch program in single precision, run it, and compare the result with PyTorch.

    The program runs in a separate process, because it may crash. The function first writes a program that uses XNNPACK.
    If this program cannot be written, crashes, or computes other results than the captured graph, the function writes
    and checks a program without XNNPACK instead.

    Args:
        step: The captured step.
        file: The `.pte` file to write. If both programs fail, the file is removed.
        batches: The batches for the comparison, from `step_checks.random_batches`.
        learning_rate: The learning rate for the comparison.

    Raises:
        ValueError: If both programs fail, the one with XNNPACK and the one without.
        ImportError: If executorch is not installed.
    """
    with requires_extra("executorch"):
        import executorch  # noqa: F401 - raises an error early if executorch is missing
    problems = []
    for xnnpack in (True, False):
        try:
            arena_bytes = write_train_program(step, file, xnnpack=xnnpack)
            found = _run_program(file, batches, learning_rate)
            difference, allowed = _compare(step, batches, learning_rate, found)
        except Exception as error:  # the converter of ExecuTorch raises errors of many classes
            problems.append(f"{'with' if xnnpack else 'without'} XNNPACK: {error}")
            continue
        return TrainProgram(
            state_names=[*step.adapter, *step.state],
            xnnpack=xnnpack,
            arena_bytes=arena_bytes,
            step_s=found["step_s"].item(),
            difference=difference,
            allowed_difference=allowed,
        )
    file.unlink(missing_ok=True)
    raise ValueError(f"{file.name}: no ExecuTorch program trains this adapter ({'; '.join(problems)}): use ONNX")


class _Method(nn.Module):
    """A module that becomes one method of the ExecuTorch program. It calls `function(body, buffers, inputs)`.

    The modules of all methods have the same buffers `state_0`, `state_1`, ..., which hold the adapter and the
    optimizer state.
    """

    def __init__(self, values: list[Tensor], function: Callable[..., Any], body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body  # torch.export gives every exported module an attribute `graph`, so avoid that name
        self.function = function
        for index, value in enumerate(values):
            self.register_buffer(f"{_BUFFER}{index}", value.clone())

    def forward(self, *inputs: Tensor) -> Any:
        buffers = [getattr(self, f"{_BUFFER}{index}") for index in range(len(list(self.buffers(recurse=False))))]
        return self.function(self.body, buffers, inputs)


def write_train_program(step: TrainStep, file: Path, *, xnnpack: bool) -> dict[str, list[int]]:
    """Write the step as an ExecuTorch program. Return the sizes of its memory arenas (`TrainProgram.arena_bytes`).

    Raises:
        RuntimeError: If ExecuTorch cannot convert the step.
        ImportError: If executorch is not installed.
    """
    with requires_extra("executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
    methods = _methods(step)
    with torch.no_grad():
        programs = {
            name: torch.export.export(module, inputs, strict=False) for name, (module, inputs) in methods.items()
        }
    edge = to_edge_transform_and_lower(
        programs,
        partitioner={name: [XnnpackPartitioner()] if xnnpack else [] for name in programs},
        # Switch off the validity check, because it may reject the unusual convolutions of the backward pass.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    lowered = edge.to_executorch(
        ExecutorchBackendConfig(
            passes=[InitializedMutableBufferPass([_BUFFER])],
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
        )
    )
    file.write_bytes(lowered.buffer)
    plans = lowered.executorch_program.execution_plan
    # The first entry of `non_const_buffer_sizes` is reserved, and is 0.
    return {plan.name: [int(size) for size in plan.non_const_buffer_sizes[1:]] for plan in plans}


def _methods(step: TrainStep) -> dict[str, tuple[_Method, tuple[Tensor, ...]]]:
    """Return a dict from the name of each ExecuTorch method to a pair of the method's module and example inputs."""
    state = {**step.adapter, **step.state}
    values = [value.float() for value in state.values()]
    batch = [name for name in step.step.inputs if name not in state]
    examples = {
        name: torch.zeros(node.meta["val"].shape, dtype=_single(node.meta["val"].dtype))
        for name, node in zip(step.step.inputs, step.step.module.graph.find_nodes(op="placeholder"), strict=True)
    }

    def run(graph: CapturedGraph, names: list[str]) -> Callable[..., dict[str, Tensor]]:
        def call(module: nn.Module, buffers: list[Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
            known = dict(zip(names, inputs, strict=True)) | dict(zip(state, buffers, strict=True))
            return dict(zip(graph.outputs, module(*[known[name] for name in graph.inputs]), strict=True))

        return call

    run_step, run_predict = run(step.step, batch), run(step.predict, batch[:1])

    def train(module: nn.Module, buffers: list[Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        found = run_step(module, buffers, inputs)
        for name, buffer in zip(state, buffers, strict=True):
            buffer.copy_(found[f"{NEW}{name}"])
        return found[LOSS], found[CORRECT]

    def predict(network: nn.ModuleList, buffers: list[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        *frozen, last = network
        return run_predict(last, buffers, frozen[0](*inputs) if frozen else inputs)[LOGITS]

    def prefix(module: nn.Module, _: list[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return module(*inputs)[0]

    def get(_: None, buffers: list[Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(buffer.clone() for buffer in buffers)

    def replace(_: None, buffers: list[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        return inputs[0].sum()  # callers ignore this sum, but an ExecuTorch method must return a result

    network = nn.ModuleList(_single_precision(graph.module) for graph in (step.prefix, step.predict) if graph)
    images = (torch.zeros((step.prefix or step.predict).input_shapes[IMAGES]),)
    methods = {
        "train_step": (
            _Method(values, train, _single_precision(step.step.module)),
            tuple(examples[name] for name in batch),
        ),
        "predict": (_Method(values, predict, network), images),
        "get_state": (_Method(values, get), ()),
        "set_state": (_Method(values, replace), tuple(values)),
    }
    if step.prefix is not None:
        methods["prefix"] = (_Method(values, prefix, _single_precision(step.prefix.module)), images)
    return methods


def _single(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for float64. Return any other dtype unchanged."""
    return torch.float32 if dtype == torch.float64 else dtype


def _single_precision(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a captured graph in which weights and dtype arguments are float32 instead of float64."""
    module = copy.deepcopy(module).float()
    for node in module.graph.nodes:
        node.args = map_aggregate(node.args, _single_argument)
        node.kwargs = map_aggregate(node.kwargs, _single_argument)
    module.recompile()
    return module


def _single_argument(value: Any) -> Any:
    return _single(value) if isinstance(value, torch.dtype) else value


# --- check ----------------------------------------------------------------------------------------------------------


def _run_program(file: Path, batches: Sequence[Batch], learning_rate: float) -> dict[str, Tensor]:
    """Call `run_program` in a new process, and return its result. Raise a RuntimeError if the process fails."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "batches.safetensors", Path(scratch) / "results.safetensors"
        tensors = {f"{name}.{index}": value for index, batch in enumerate(batches) for name, value in batch.items()}
        save_file({**tensors, LEARNING_RATE: torch.tensor(learning_rate)}, inputs)
        command = [sys.executable, "-m", __name__, str(file), str(inputs), str(outputs)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"exit code {ended.returncode}: {last}")
        return load_file(outputs)


def run_program(file: Path, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run all methods of an ExecuTorch program in this process.

    Args:
        file: The `.pte` file.
        batches: The tensors `images.0`, `labels.0`, `mask.0`, `images.1`, ... and `learning_rate`.

    Returns:
        A dict with the `losses`, the `logits` of the first batch (computed with the trained adapter), `step_s` (the
        seconds of the fastest step), and the results of three calls of the program's method `get_state`. The i-th
        tensor of each result is in the dict as `old.<i>` for the call before the steps, `new.<i>` for the call after
        the steps, and `reset.<i>` for the call after the method `set_state` has restored the old tensors.
    """
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    methods = {name: program.load_method(name) for name in program.method_names}

    def run(name: str, *inputs: Tensor) -> list[Tensor]:
        return [value.clone() for value in methods[name].execute(inputs)]  # the next call overwrites the results

    old, losses, seconds = run("get_state"), [], []
    for index in range(sum(name.startswith(f"{LABELS}.") for name in batches)):
        images, labels, mask = (batches[f"{name}.{index}"] for name in (IMAGES, LABELS, MASK))
        (data,) = run("prefix", images) if "prefix" in methods else (images,)
        start = time.perf_counter()
        loss, _ = run("train_step", data, labels, mask, batches[LEARNING_RATE])
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    results = {f"old.{place}": value for place, value in enumerate(old)}
    results |= {f"new.{place}": value for place, value in enumerate(run("get_state"))}
    (results[LOGITS],) = run("predict", batches[f"{IMAGES}.0"])
    run("set_state", *old)
    results |= {f"reset.{place}": value for place, value in enumerate(run("get_state"))}
    return {**results, "losses": torch.stack(losses), "step_s": torch.tensor(min(seconds))}


def _compare(
    step: TrainStep, batches: Sequence[Batch], learning_rate: float, found: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Compare `found`, the result of `run_program`, with the captured graph in PyTorch.

    Return `difference` and `allowed_difference` of `TrainProgram`.

    Raises:
        RuntimeError: If `difference` exceeds `allowed_difference`, or the logits differ from those of the captured
            graph. If the program's method `get_state` returned another state than the initial one, either before the
            steps or after its method `set_state` was called with the initial state.
    """
    state = {**step.adapter, **step.state}
    for place, value in enumerate(state.values()):
        for label in ("old", "reset"):
            if not torch.equal(found[f"{label}.{place}"], value.float()):
                raise RuntimeError("get_state does not return the state that was set")
    exact, rounded = (_train(step, batches, learning_rate, dtype) for dtype in (torch.float64, torch.float32))
    trained = {name: found[f"new.{place}"].double() for place, name in enumerate(state)}

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return sum((one[name].double() - other[name].double()).square().sum().item() for name in step.adapter) ** 0.5

    change = distance(exact, step.adapter)
    difference = distance(trained, exact) / change
    allowed = max(ALLOWED_RATIO * distance(rounded, exact) / change, FLOOR)
    if not difference <= allowed:
        raise RuntimeError(
            f"the adapter differs from PyTorch's by {difference:.1e} of its change ({allowed:.1e} allowed)"
        )
    logits = step.predict.run({**trained, step.data: step.features(batches[0][IMAGES].double())})[LOGITS]
    gap = (found[LOGITS] - logits).abs().max().item()
    if not gap <= LOGIT_TOLERANCE * max(1.0, logits.abs().max().item()):
        raise RuntimeError(f"the logits differ from PyTorch's by {gap:.1e}")
    return difference, allowed


def _train(step: TrainStep, batches: Sequence[Batch], learning_rate: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Train with the captured graph in PyTorch, in the precision `dtype`, one step for each batch.

    Return the new adapter and optimizer state in one dict.
    """
    module = step.step.module if dtype == torch.float64 else _single_precision(step.step.module)
    values = {name: value.to(dtype) for name, value in {**step.adapter, **step.state}.items()}
    for batch in batches:
        features, rate = step.features(batch[IMAGES].double()), torch.tensor(learning_rate)
        inputs = {step.data: features, LABELS: batch[LABELS], MASK: batch[MASK], LEARNING_RATE: rate}
        known = values | {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        with torch.no_grad():
            found = dict(zip(step.step.outputs, module(*[known[name] for name in step.step.inputs]), strict=True))
        values = {name: found[f"{NEW}{name}"] for name in values}
    return values


if __name__ == "__main__":
    torch.set_num_threads(1)
    _program, _batches, _out = map(Path, sys.argv[1:])
    save_file(run_program(_program, load_file(_batches)), _out)
