"""Files that came from elsewhere: read within limits, and refused before anything is built from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

JSON_LIMIT = 2**20
"""Bytes of a JSON file. The configuration of an adapter takes a few thousand."""

HEADER_LIMIT = 2**23
"""Bytes of the header of a safetensors file. It takes about a hundred for each tensor."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and the type of every tensor, by its name."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def read_json(path: Path) -> Any:
    """Reads a JSON file of at most `JSON_LIMIT` bytes, in which no key stands twice and every number is finite.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise ValueError(f"it has more than the {JSON_LIMIT:,} bytes that are read of such a file")
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def read_layout(path: Path) -> Layout:
    """Reads names, shapes and types from the header of a safetensors file; the tensors are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds tensors of a type that no network here has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    problem: Exception | str = f"its header would take {header:,} bytes"
    if header <= min(HEADER_LIMIT, size):
        try:
            with safe_open(path, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
                dtypes = {name: part.get_dtype() for name, part in slices.items()}
                if not (unknown := set(dtypes.values()) - _DTYPES.keys()):
                    return {name: (tuple(part.get_shape()), _DTYPES[dtypes[name]]) for name, part in slices.items()}
        except SafetensorError as error:
            problem = error
        else:
            raise ValueError(f"{path}: expected tensors of the types {', '.join(_DTYPES)}, found {sorted(unknown)}")
    raise ValueError(
        f"{path} is truncated or damaged: {size} bytes are no whole safetensors file ({problem}). Copy it again from "
        "where it was made"
    ) from (problem if isinstance(problem, Exception) else None)


def check_finite(path: Path) -> None:
    """Checks that every value in a safetensors file is finite.

    Raises:
        ValueError: One is not; the message names the tensor.
    """
    for name, tensor in safetensors.torch.load_file(path).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite. Copy it again from where it was made")
