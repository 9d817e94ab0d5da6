from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from peft_edge.data import FAMILIES, SHIFTS, load_task
from peft_edge.data.shifts import Shift

# Half of the pixels make blocks of equal size, which lie nearer to the image than the uneven ones of more pixels.
GROWING = [
    name for family in ("noise", "blur", "weather", "digital") for name in FAMILIES[family] if name != "pixelate"
]


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((200, 100, 296, 164))


def shifted(image: Image.Image, name: str, severity: int | None = None) -> np.ndarray:
    return np.asarray(Shift(name, severity)(image)).astype(int)


def test_every_shift_is_in_one_family() -> None:
    assert sorted(name for family in FAMILIES.values() for name in family) == list(SHIFTS)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_changes_the_image_the_same_way_each_time(name: str, photograph: Image.Image) -> None:
    first = shifted(photograph, name)
    assert first.shape == (64, 96, 3)
    assert not np.array_equal(first, np.asarray(photograph))
    assert np.array_equal(first, shifted(photograph, name))


@pytest.mark.parametrize("name", GROWING)
def test_more_severe_means_farther_from_the_image(name: str, photograph: Image.Image) -> None:
    distances = [
        np.abs(shifted(photograph, name, severity) - np.asarray(photograph)).mean() for severity in range(1, 6)
    ]
    assert distances == sorted(set(distances))
    assert np.array_equal(shifted(photograph, name), shifted(photograph, name, 5))


def test_different_images_are_blended_with_different_crops() -> None:
    task = load_task("digits", shift="blend", image_size=16)
    target = task.targets[0]
    first, second = (
        np.asarray(target.test[i]["image"]).astype(int) - np.asarray(task.source.test[i]["image"]) for i in (0, 1)
    )
    assert not np.array_equal(first[:2], second[:2])


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("contrst", None, "did you mean 'contrast'"),
        ("contrast", 6, "must be 1 to 5, found 6"),
        ("contrast", 0, "must be 1 to 5, found 0"),
        ("invert", 2, "no degrees"),
    ],
)
def test_bad_input(name: str, severity: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shift(name, severity)
