from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_edge.hub.reading import HEADER_LIMIT, JSON_LIMIT, check_finite, read_json, read_layout


@pytest.mark.parametrize("value", [{}, [], {"a": [1, 2.5, None, True, "é"]}, "x" * 1000])
def test_json_is_read_as_by_the_standard_library(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "a key stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ('"' + "x" * JSON_LIMIT + '"', "more than the 1,048,576 bytes"),
        ("9" * 10_000, "integer string conversion"),
        ("{", "Expecting property name"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_json(tmp_path / "a.json")


def test_the_layout_is_that_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0, 4).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_layout(tmp_path / "a.safetensors") == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def written(path: Path, header: dict[str, object], data: bytes = b"", claimed: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


@pytest.mark.parametrize("claimed", [2**63, HEADER_LIMIT + 1, 1000])
def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path, claimed: int) -> None:
    file = written(tmp_path / "a.safetensors", {}, claimed=claimed)
    with pytest.raises(ValueError, match=r"truncated or damaged: 10 bytes .*its header would take"):
        read_layout(file)


@pytest.mark.parametrize("shape", [[2**40, 2**20], [3], [-1]])
def test_a_tensor_that_claims_more_than_there_is_is_refused(tmp_path: Path, shape: list[int]) -> None:
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_layout(written(tmp_path / "a.safetensors", header, b"\0" * 8))


def test_types_that_no_network_has_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"expected tensors of the types F64, .*found \['U8'\]"):
        read_layout(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    save_file({"a": torch.zeros(2), "b": torch.tensor([1, value])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="b holds values that are not finite"):
        check_finite(tmp_path / "a.safetensors")
