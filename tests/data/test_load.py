from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from peft_edge.data import load, load_task, shapes, sources

from .conftest import ImageFolder


def sizes(domain: object) -> list[int]:
    return [len(split) for split in vars(domain).values()]


def pixels(split: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in split["image"]]).astype(int)


def test_shapes_have_the_documented_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The number of images is what takes time; a hundredth of the source will do.
    monkeypatch.setitem(shapes.SPLIT_SIZES, "source", 200)
    task = load_task("shapes", shift="rotation", image_size=16)
    assert sizes(task.source) == [200, 500, 2000]
    assert sizes(task.target) == [512, 500, 2000]
    assert task.num_classes == 20
    assert np.array_equal(pixels(task.target.validation), np.rot90(pixels(task.source.validation), axes=(1, 2)))


def test_a_shifted_folder_keeps_its_images_apart(image_folder: ImageFolder) -> None:
    folder = str(image_folder("pets", ["cat", "dog"], count=50))
    task = load_task(folder, shift="invert", adaptation_size=10)
    assert sizes(task.source) == [60, 10, 20]
    assert sizes(task.target) == [10, 10, 20]
    assert np.array_equal(pixels(task.target.test), 255 - pixels(task.source.test))
    source = {image.tobytes() for image in pixels(task.source.train)}
    assert not source & {image.tobytes() for image in 255 - pixels(task.target.train)}


def test_another_folder_can_be_the_target(image_folder: ImageFolder) -> None:
    day, night = image_folder("day", ["cat", "dog"], count=30), image_folder("at night", ["cat", "dog"], count=20)
    task = load_task(str(day), shift=str(night), adaptation_size=12)
    assert sizes(task.source) == [42, 6, 12]
    assert sizes(task.target) == [12, 4, 8]
    assert task.shift == str(night)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, random_images: Callable[..., Dataset]) -> dict[str, list[str]]:
    """Maps the names of data sets on the Hub to their classes; each has 40 images by day and 30 at dusk."""
    classes: dict[str, list[str]] = {}

    def serve(name: str, subset: str | None) -> DatasetDict:
        return DatasetDict(train=random_images(40, classes[name]), dusk=random_images(30, classes[name], seed=1))

    monkeypatch.setattr(sources, "load_dataset", serve)
    return classes


def test_another_split_can_be_the_target(hub: dict[str, list[str]]) -> None:
    hub["owner/pets"] = ["cat", "dog"]
    task = load_task("owner/pets", shift="dusk")
    assert sizes(task.source) == [28, 4, 8]
    assert sizes(task.target) == [21, 3, 6]


def test_the_same_classes_in_another_order_are_renumbered(hub: dict[str, list[str]]) -> None:
    hub |= {"owner/pets": ["cat", "dog"], "owner/animals": ["dog", "cat"]}
    images = sources.load_dataset("owner/animals", None)["train"]
    names = {
        image.tobytes(): ("dog", "cat")[label] for image, label in zip(pixels(images), images["label"], strict=True)
    }
    task = load_task("owner/pets", shift="owner/animals")
    assert task.class_names == task.target.test.features["label"].names == ["cat", "dog"]
    for split in vars(task.target).values():
        found = [names[image.tobytes()] for image in pixels(split)]
        assert found == [task.class_names[label] for label in split["label"]]


def test_different_classes_are_refused(image_folder: ImageFolder) -> None:
    day, night = image_folder("day", ["cat", "dog"]), image_folder("night", ["cat", "owl"])
    with pytest.raises(ValueError, match=r"missing \['dog'\], extra \['owl'\]"):
        load_task(str(day), shift=str(night))


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [
        ("digit", "invert", "unknown data 'digit': did you mean 'digits'"),
        ("./nowhere", "invert", "unknown data './nowhere': there is no such folder"),
        ("digits", "bland", "unknown shift 'bland': did you mean 'blend'"),
        ("digits", "/nowhere/at/all", "there is no such folder"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_read(
    name: str, shift: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "EMBEDDED", dict.fromkeys(load.EMBEDDED))
    with pytest.raises(ValueError, match=message):
        load_task(name, shift=shift)


def test_the_fingerprint_follows_the_images() -> None:
    task = load_task("digits", shift="contrast", image_size=8)
    milder = load_task("digits", shift="contrast", image_size=8, severity=3)
    other_seed = load_task("digits", shift="contrast", image_size=8, seed=1)
    assert milder.source.fingerprint == task.source.fingerprint != other_seed.source.fingerprint
    assert len({task.fingerprint, milder.fingerprint, other_seed.fingerprint}) == 3


def test_another_process_finds_the_same_fingerprint() -> None:
    script = "from peft_edge.data import load_task; print(load_task('digits', shift='blend', image_size=8).fingerprint)"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == load_task("digits", shift="blend", image_size=8).fingerprint
