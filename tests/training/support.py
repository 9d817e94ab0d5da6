"""Functions that read the results of a run, for several tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from peft_edge.records import Record

RunTraining = Callable[..., Record]
"""The fixture `run`: called with an output folder and overrides, it runs train.py and returns the record."""


def record_of(folder: Path) -> Record:
    return Record.from_json((folder / "record.json").read_text())


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")
