from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from peft_edge.data import SHIFTS, load_task
from peft_edge.data.shifts import Shift

GROWING = ["brightness", "contrast", "gaussian_blur", "gaussian_noise", "jpeg"]


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((200, 100, 296, 164))


def shifted(image: Image.Image, name: str, severity: int | None = None) -> np.ndarray:
    return np.asarray(Shift(name, severity)(image)).astype(int)


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


@pytest.mark.parametrize(
    ("name", "severity", "reference", "tolerance"),
    [
        ("brightness", 2, lambda image: ImageEnhance.Brightness(image).enhance(0.6), 1),
        ("contrast", 5, lambda image: ImageEnhance.Contrast(image).enhance(0.15), 1),
        ("grayscale", None, lambda image: image.convert("L").convert("RGB"), 1),
        ("invert", None, ImageOps.invert, 0),
    ],
)
def test_it_is_what_pillow_does(name, severity, reference, tolerance, photograph: Image.Image) -> None:
    expected = np.asarray(reference(photograph)).astype(int)
    assert np.abs(shifted(photograph, name, severity) - expected).max() <= tolerance


def test_noise_has_the_stated_deviation() -> None:
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    assert shifted(grey, "gaussian_noise", 1).std() / 255 == pytest.approx(0.08, rel=0.02)


def test_rotation_by_90_degrees_moves_pixels_unchanged(photograph: Image.Image) -> None:
    square = photograph.crop((0, 0, 64, 64))
    assert np.array_equal(shifted(square, "rotation"), np.rot90(np.asarray(square)))


def test_rotation_leaves_no_black_corners() -> None:
    white = Image.new("RGB", (48, 48), (255, 255, 255))
    assert shifted(white, "rotation", 3).min() == 255


@pytest.mark.parametrize("brightness", [0, 255])
def test_blend_is_the_distance_to_a_crop_of_a_photograph(brightness: int) -> None:
    blended = shifted(Image.new("RGB", (24, 24), (brightness,) * 3), "blend")
    crop = np.abs(blended - brightness).astype(np.uint8)
    windows = [
        np.lib.stride_tricks.sliding_window_view(whole, (1, 24, 3))[..., 0, 0, :, :]
        for whole in load_sample_images().images
    ]
    assert any((window == crop[0]).all((-1, -2)).any() for window in windows)


def test_different_images_are_blended_with_different_crops() -> None:
    task = load_task("digits", shift="blend", image_size=16)
    first, second = (
        np.asarray(task.target.test[i]["image"]).astype(int) - np.asarray(task.source.test[i]["image"]) for i in (0, 1)
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
