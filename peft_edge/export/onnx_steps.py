"""Run the files of an exported training step. `export_train_step` starts this script in a process without PyTorch.

`python onnx_steps.py train FOLDER BATCHES OUT` takes one step for each batch in the safetensors file BATCHES. FOLDER
contains the ONNX files. BATCHES contains the tensors `images.0`, `labels.0`, `mask.0`, `images.1`, ... and
`learning_rate`. If the step takes features (outputs of the frozen first layers) instead of images, BATCHES also
contains `features.0`, `features.1`, ... After the steps, the script computes the logits of `images.0` with the trained
adapter. It writes the dict that `run_steps` returns to the safetensors file OUT.

`python onnx_steps.py features FOLDER BATCHES OUT` writes the features of `images.0`, ... to OUT, as `features.0`, ...
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Read = Callable[[str], np.ndarray]
"""A function from the name of a tensor in BATCHES to this tensor."""


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file with options that save memory.

    ONNX Runtime then runs the nodes in the order of the file, unless its optimizations replace nodes. After the last
    use of a tensor, its memory is available for tensors of every shape, not only for tensors of the same shape.
    """
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def process_peak_bytes() -> int:
    """Return the peak physical memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, `ru_maxrss` of a new process starts at the memory of its parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_steps(folder: Path, read: Read, count: int) -> dict[str, np.ndarray]:
    """Take `count` training steps with the ONNX files in `folder`, then predict with the trained adapter.

    The first step starts from the adapter and the optimizer state in `state.safetensors`, a file in `folder`.

    Returns:
        A dict from names to arrays. The tensors of the new adapter and optimizer state have the same names as in
        `state.safetensors`. `losses` and `correct` are the loss and the number of correct predictions of each step.
        `logits.batch` are the logits of the first batch. `logits.single` are the logits of the first image in this
        batch, computed in a batch of one image. `step_s` is the time of the fastest step in seconds. `peak_rss_bytes`
        is the peak memory of the process at the end of the last step.
    """
    session = open_session(folder / "train_step.onnx")
    data = "features" if "features" in {each.name for each in session.get_inputs()} else "images"
    names = [output.name for output in session.get_outputs()]
    values = load_file(folder / "state.safetensors")
    losses, correct, seconds, rate = [], [], [], read("learning_rate")
    for index in range(count):
        batch = {name: read(f"{name}.{index}") for name in (data, "labels", "mask")}
        start = time.perf_counter()
        found = dict(zip(names, session.run(None, {**values, **batch, "learning_rate": rate}), strict=True))
        seconds.append(time.perf_counter() - start)
        values = {name: found[f"new:{name}"] for name in values}
        losses.append(found["loss"])
        correct.append(found["correct"])
    peak = process_peak_bytes()
    del session
    session, images = open_session(folder / "predict.onnx"), read("images.0")
    adapter = {each.name: values[each.name] for each in session.get_inputs() if each.name != "images"}
    for label, rows in (("batch", images), ("single", images[:1])):
        (values[f"logits.{label}"],) = session.run(["logits"], {**adapter, "images": rows})
    measured = {"step_s": np.float64(min(seconds)), "peak_rss_bytes": np.int64(peak)}
    return {**values, "losses": np.array(losses), "correct": np.array(correct), **measured}


def run_prefix(folder: Path, read: Read, count: int) -> dict[str, np.ndarray]:
    """Run `prefix.onnx` on the images of `count` batches, and return its outputs: `features.0`, `features.1`, ..."""
    session = open_session(folder / "prefix.onnx")
    return {f"features.{i}": session.run(["features"], {"images": read(f"images.{i}")})[0] for i in range(count)}


if __name__ == "__main__":
    _run = {"train": run_steps, "features": run_prefix}[sys.argv[1]]
    _folder, _batches, _out = map(Path, sys.argv[2:])
    with safe_open(_batches, framework="numpy") as _tensors:  # `load_file` would read all batches at once
        _count = sum(name.startswith("images.") for name in _tensors.keys())  # noqa: SIM118 - not a mapping
        _results = _run(_folder, _tensors.get_tensor, _count)
    save_file({name: np.asarray(value) for name, value in _results.items()}, _out)
