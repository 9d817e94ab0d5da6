from __future__ import annotations

from pathlib import Path

import pytest

from peft_edge.data import SHIFTS
from peft_edge.data.task import EMBEDDED
from peft_edge.names import DATA_NAMES, SHIFT_NAMES, did_you_mean, problem_of_data, problem_of_shift, split_of


def test_the_names_repeated_here_are_those_of_the_data() -> None:
    assert (tuple(EMBEDDED), SHIFTS) == (DATA_NAMES, SHIFT_NAMES)


@pytest.mark.parametrize(("name", "is_similar"), [("LORA", True), ("lorra", True), ("tflite", False), ("", False)])
def test_only_a_similar_name_is_suggested(name: str, is_similar: bool) -> None:
    assert bool(did_you_mean(name, ["lora", "torch-export", "full"])) == is_similar


def test_names_of_splits() -> None:
    assert [split_of(name) for name in ("dev", "Valid", "test-images", "test images 2", "contest")] == [
        "validation",
        "validation",
        "test",
        None,
        None,
    ]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "reports", "PACS/photo", "PACS/sketch"):
        Path(name).mkdir(parents=True)
    Path("photos.zip").touch()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shapes", None),
        ("photos", None),
        ("PACS/photo", None),
        ("owner/photos", None),  # may be on the Hub
        ("photo", "did you mean 'photos'?"),
        ("potos", "did you mean 'photos'?"),
        ("parrots", "expected digits"),  # is not similar enough to reports
        ("mnist", "expected digits, shapes, a folder that exists, or a Hugging Face dataset with its owner"),
        ("PACS/photos", "there is no such folder; did you mean 'PACS/photo'?"),
        ("photso/", "there is no such folder; did you mean 'photos'?"),
        ("photos\\night", "there is no such folder"),
        ("../photos", "there is no such folder"),
        ("PACS/cartoon", "there is no such folder"),
        ("path/to/photos", "there is no such folder"),
        ("./photos.zip", "this is a file"),
        ("photos.zip", "this is a file"),
    ],
)
@pytest.mark.usefixtures("folders")
def test_data_that_cannot_be_read_are_recognised_without_the_hub(name: str, problem: str | None) -> None:
    found = problem_of_data(name)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("shift", "data", "is_possible"),
    [
        ("fog", "digits", True),
        ("test", "digits", False),
        ("test", "photos", True),
        ("dusk", "photos", False),
        ("tset", "photos", False),
        ("dusk", "owner/pets", True),  # may be a split
        ("noise", "owner/pets", True),
        ("fogg", "owner/pets", False),
        ("owner/night", "photos", True),
        ("photos/night", "photos", False),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_shift_that_cannot_exist_is_recognised_without_the_hub(shift: str, data: str, is_possible: bool) -> None:
    assert (problem_of_shift(shift, data) is None) == is_possible
