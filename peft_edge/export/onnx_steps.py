"""Run training steps of an exported folder. `export_train_step` starts this script in a process without PyTorch.

`python onnx_steps.py FOLDER BATCHES OUT` takes one step for each batch in the safetensors file BATCHES, which contains
the tensors `images.0`, `labels.0`, `mask.0`, `images.1`, ... and `learning_rate`. Then the script computes the logits
of the first batch with the trained adapter. It writes the losses, the numbers of correct predictions, the logits, the
new state, the time of the fastest step and the peak memory of the process to the safetensors file OUT.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file, save_file


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file with options that save memory.

    ONNX Runtime then runs the nodes in the order of the file. Only basic optimizations are enabled, because extended
    fusions would change this order. ONNX Runtime frees each tensor after its last use, and does not keep the memory for
    a later tensor of the same shape.
    """
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = False
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def process_peak_bytes() -> int:
    """Return the peak physical memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss includes the memory of the parent process at the start
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_steps(folder: Path, batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take the steps from the initial state in `folder`, and return the contents of OUT (see the module docstring)."""
    session = open_session(folder / "train_step.onnx")
    names = [output.name for output in session.get_outputs()]
    values = load_file(folder / "state.safetensors")
    losses, correct, seconds, rate = [], [], [], batches["learning_rate"]
    for index in range(sum(name.startswith("images.") for name in batches)):
        batch = {name: batches[f"{name}.{index}"] for name in ("images", "labels", "mask")}
        start = time.perf_counter()
        found = dict(zip(names, session.run(None, {**values, **batch, "learning_rate": rate}), strict=True))
        seconds.append(time.perf_counter() - start)
        values = {name: found[f"new:{name}"] for name in values}
        losses.append(found["loss"])
        correct.append(found["correct"])
    peak = process_peak_bytes()
    del session
    session = open_session(folder / "predict.onnx")
    inputs = {each.name for each in session.get_inputs()}
    for label, images in (("batch", batches["images.0"]), ("single", batches["images.0"][:1])):
        values[f"logits.{label}"] = session.run(
            ["logits"], {**{name: values[name] for name in inputs if name != "images"}, "images": images}
        )[0]
    measured = {"step_s": np.float64(min(seconds)), "peak_rss_bytes": np.int64(peak)}
    return {**values, "losses": np.array(losses), "correct": np.array(correct), **measured}


if __name__ == "__main__":
    _folder, _batches, _out = map(Path, sys.argv[1:])
    save_file({name: np.asarray(value) for name, value in run_steps(_folder, load_file(_batches)).items()}, _out)
