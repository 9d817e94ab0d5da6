"""Train an exported adapter in ONNX Runtime or in PyTorch. `device_study` starts this script in a process of its own.

`python device_worker.py onnx|torch JOB` reads the JSON file JOB, which `device_study` has written. With `onnx`, the
process imports neither PyTorch nor this package.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[dict[str, np.ndarray]], None]
"""A function that takes one training step.

Its argument is a dict with the keys `images` (or `features`), `labels`, `mask` (1 for samples, 0 for padding) and
`learning_rate`.
"""


def read_rows(file: Path, shape: list[int], rows: list[int]) -> np.ndarray:
    """Read the rows with the numbers `rows` from a binary file of float32 values. A row has the shape `shape`.

    The function does not map the file into memory, because mapped pages would count as memory of the process.

    Returns:
        An array of shape (len(rows), *shape).
    """
    size = int(np.prod(shape))
    return np.stack([np.fromfile(file, np.float32, size, offset=4 * size * row).reshape(shape) for row in rows])


def prepare_onnx(job: dict[str, Any]) -> tuple[Step, Callable[[], None]]:
    """Return a function that takes a step in ONNX Runtime, and a function that saves adapter and optimizer state."""
    from safetensors.numpy import load_file, save_file

    folder = Path(job["folder"])
    session = runpy.run_path(job["onnx_steps"])["open_session"](folder / "train_step.onnx")
    names = [output.name for output in session.get_outputs()]
    state = load_file(folder / "state.safetensors")

    def step(batch: dict[str, np.ndarray]) -> None:
        found = dict(zip(names, session.run(None, {**state, **batch}), strict=True))
        state.update({name: found[f"new:{name}"] for name in state})

    return step, lambda: save_file(state, job["out"])


def prepare_torch(job: dict[str, Any]) -> tuple[Step, Callable[[], None]]:
    """Return a function that takes a step in PyTorch with lean training, and a function that saves the adapter."""
    import torch
    from torch.nn import functional as F

    from peft_edge.hub import load_pretrained, save_adapter
    from peft_edge.lean import prepare_model_for_lean_training

    torch.set_num_threads(1)
    model = load_pretrained(Path(job["folder"]) / "adapter")
    model.set_adapter(model.active_adapter)
    model = prepare_model_for_lean_training(model.to(memory_format=torch.channels_last).eval(), inplace_norm=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=job["momentum"])

    def step(batch: dict[str, np.ndarray]) -> None:
        kept = batch["mask"] > 0
        images = torch.from_numpy(batch["images"][kept]).contiguous(memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = float(batch["learning_rate"])
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.from_numpy(batch["labels"][kept])).backward()
        optimizer.step()

    return step, lambda: save_adapter(model, job["out"])


def train_job(runtime: str, job: dict[str, Any]) -> dict[str, Any]:
    """Take the training steps that `job` describes, and save the result. `device_study` has created `job`.

    Returns:
        A dict with the CPU seconds of each step (`seconds`) and the peak memory of this process (`peak_bytes`).
    """
    step, save = {"onnx": prepare_onnx, "torch": prepare_torch}[runtime](job)
    batch_size, seconds = job["batch_size"], []
    for rows, rate in zip(job["batches"], job["learning_rates"], strict=True):
        padded = [*rows, *[rows[0]] * (batch_size - len(rows))]
        batch = {
            job["input"]: read_rows(Path(job["data"]), job["shape"], padded),
            "labels": np.array([job["labels"][row] for row in padded]),
            "mask": np.array([1.0] * len(rows) + [0.0] * (batch_size - len(rows)), np.float32),
            "learning_rate": np.array(rate, np.float32),
        }
        start = time.process_time()
        step(batch)
        seconds.append(time.process_time() - start)
    save()
    return {"seconds": seconds, "peak_bytes": runpy.run_path(job["onnx_steps"])["process_peak_bytes"]()}


if __name__ == "__main__":
    print(json.dumps(train_job(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
