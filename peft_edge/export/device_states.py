"""Convert the state files of devices to a PEFT adapter.

A device trains with the folder that `peft_edge.export.export_train_step` wrote. A state file is the safetensors file in
which the device saves the trained adapter and the optimizer state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_edge.files import atomic_write
from peft_edge.hub.adapter_files import read_json, read_layout

STEP_NAME, PREDICT_NAME, PREFIX_NAME = "train_step.onnx", "predict.onnx", "prefix.onnx"
PROGRAM_NAME = "train.pte"  # for ExecuTorch, in place of the three ONNX files
STATE_NAME, DESCRIPTION_NAME = "state.safetensors", "step.json"
ADAPTER_FOLDER, ORIGIN_NAME = "adapter", "device_training.json"
FORMAT_VERSION = 1


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

    The folder `out` also contains `device_training.json`. For each state file, it lists the name, the SHA-256, the
    weight divided by the sum of all weights, and the metadata. The metadata are texts that the device stored, such as
    the name of the device and the number of steps. `device_training.json` also contains the time of the import, the
    name and fingerprint (a hash of the weights) of the base model, the optimizer, and package versions.

    Args:
        folder: The folder that `export_train_step` wrote.
        states: The safetensors file that a device saved, or a list of such files.
        out: The folder of the adapter. It is created or replaced only after all files have been written.
        weights: The weight of each state file in the average, such as the number of images on each device. By default,
            all weights are equal.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `step.json` or a state file is damaged, a state file does not fit the step in `folder`, an
            adapter value is not finite, or `weights` is invalid.
        OSError: If the adapter cannot be written.
    """
    folder = Path(folder)
    files = [Path(states)] if isinstance(states, str | os.PathLike) else [Path(state) for state in states]
    shares = _shares(files, weights)
    description = read_step_description(folder)
    averages: dict[str, Tensor] = {}
    origins = []
    for file, share in zip(files, shares, strict=True):
        for name, value in read_state(file, description).items():
            averages[name] = averages.get(name, 0) + share * value.double()
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        origins.append({"file": file.name, "sha256": content, "weight": share, "metadata": metadata})
    source = folder / ADAPTER_FOLDER
    if not (source / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{source / SAFETENSORS_WEIGHTS_NAME} is missing: copy the whole exported folder here")
    adapter = load_file(source / SAFETENSORS_WEIGHTS_NAME)
    adapter |= {name: value.to(adapter[name].dtype) for name, value in averages.items()}
    record = {
        "trained_by": PROGRAM_NAME if PROGRAM_NAME in description["files"] else STEP_NAME,
        "imported": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "states": origins,
        **{name: description[name] for name in ("base", "optimizer", "versions")},
    }
    with atomic_write(Path(out)) as unfinished:
        shutil.copytree(source, unfinished)
        save_file(adapter, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (unfinished / ORIGIN_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _shares(files: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each file, divided by the sum of all weights. Without `weights`, all weights are equal."""
    if not files:
        raise ValueError("states: expected at least one file, found none")
    weights = [1.0] * len(files) if weights is None else list(weights)
    if len(weights) != len(files):
        raise ValueError(f"weights: expected one weight for each of the {len(files)} states, found {len(weights)}")
    total = sum(weights)
    if not (min(weights) >= 0 and 0 < total < float("inf")):
        raise ValueError(f"weights: expected numbers of at least 0 with a positive sum, found {weights}")
    return [weight / total for weight in weights]


def read_step_description(folder: Path) -> dict[str, Any]:
    """Read `step.json` in a folder that `export_train_step` wrote.

    Raises:
        FileNotFoundError: If `step.json` is missing.
        ValueError: If `step.json` is damaged, or its `format_version` is not `FORMAT_VERSION`.
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
    """Return the adapter's tensors from a state file, in which a device saved the adapter and the optimizer state.

    `description` is the content of `step.json`, which lists the names and shapes of these tensors. Tensors of the
    optimizer state may be missing in the state file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, an adapter tensor is missing, an adapter value is not finite, or a tensor is
            not float32. If a tensor of the file has a name or a shape that `description` does not list.
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
