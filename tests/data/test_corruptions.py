"""Corruptions against closed formulas, and shifts of images and datasets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from peft_edge.data import FAMILIES, SHIFTS, load_task
from peft_edge.data.corruptions import CORRUPTIONS, Shift

SIDE = 224
"""At this side, levels are in pixels."""


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((200, 100, 296, 164))


def grey(value: int, side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), (value,) * 3)


def point() -> Image.Image:
    image = grey(0)
    image.putpixel((112, 112), (255, 255, 255))
    return image


def corrupted(image: Image.Image, name: str, severity: int | None = None) -> np.ndarray:
    return np.asarray(Shift(name, severity)(image)).astype(int)


@pytest.mark.parametrize("family", ["noise", "blur", "weather", "digital"])
def test_families_have_five_severities(family: str) -> None:
    assert len(CORRUPTIONS[family]) >= 3
    assert {len(corruption.levels) for corruption in CORRUPTIONS[family].values()} == {5}


@pytest.mark.parametrize(
    ("name", "severity", "reference", "tolerance"),
    [
        ("brightness", 2, lambda image: ImageEnhance.Brightness(image).enhance(0.6), 1),
        ("contrast", 5, lambda image: ImageEnhance.Contrast(image).enhance(0.15), 1),
        ("grayscale", None, lambda image: image.convert("L").convert("RGB"), 1),
        ("invert", None, ImageOps.invert, 0),
    ],
)
def test_corruption_equals_pillow(name, severity, reference, tolerance, photograph: Image.Image) -> None:
    expected = np.asarray(reference(photograph)).astype(int)
    assert np.abs(corrupted(photograph, name, severity) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "value", "deviation"),
    [
        ("gaussian_noise", 128, 0.08),
        ("shot_noise", 128, math.sqrt(128 / 255 / 60)),  # a Poisson count of mean m has deviation sqrt(m)
        ("shot_noise", 32, math.sqrt(32 / 255 / 60)),
    ],
)
def test_noise_has_the_given_deviation(name: str, value: int, deviation: float) -> None:
    assert corrupted(grey(value), name, 1).std() / 255 == pytest.approx(deviation, rel=0.03)


def test_impulse_noise_is_black_and_white_in_equal_shares() -> None:
    noisy = corrupted(grey(128), "impulse_noise", 5)
    assert set(np.unique(noisy)) == {0, 128, 255}
    assert (noisy == 0).mean() == pytest.approx(0.135, rel=0.03)
    assert (noisy == 255).mean() == pytest.approx(0.135, rel=0.03)


@pytest.mark.parametrize("name", CORRUPTIONS["blur"])
def test_blur_of_a_uniform_image_is_unchanged(name: str) -> None:
    assert np.abs(corrupted(grey(77, 32), name) - 77).max() <= 1


def test_defocus_blur_spreads_a_point_over_a_disc() -> None:
    spot = corrupted(point(), "defocus_blur", 3)[..., 0]
    # Radius 6: the light is spread evenly over the disc.
    assert spot[112, 112] == pytest.approx(255 / (math.pi * 6**2), abs=1)
    distance = np.hypot(*(np.indices(spot.shape) - 112))
    assert spot[distance < 5].min() == spot[112, 112]
    assert spot[distance > 7].max() == 0


def test_motion_blur_spreads_a_point_along_a_line() -> None:
    rows, columns = corrupted(point(), "motion_blur", 3)[..., 0].nonzero()
    along, across = np.sqrt(np.linalg.eigvalsh(np.cov(np.stack([rows, columns])))[::-1])
    assert along == pytest.approx(20 / math.sqrt(12), rel=0.15)  # the deviation of a uniform distribution
    assert across < 1


def test_fog_fades_unevenly_into_white() -> None:
    black, dark, white = (corrupted(grey(value, 64), "fog") for value in (0, 100, 255))
    assert white.min() == 255
    assert black.std() > 5  # the depth varies
    assert (corrupted(grey(0, 64), "fog", 1).mean() < black.mean()) & (dark.min() > 100)


def test_snow_brightens_and_has_one_direction() -> None:
    snowy = corrupted(grey(60), "snow", 1)[..., 0]
    assert snowy.min() >= 60
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(snowy - snowy.mean()))) ** 2
    offsets = np.stack(np.indices(spectrum.shape) - 112).reshape(2, -1)
    short, long = np.linalg.eigvalsh(np.cov(offsets, aweights=spectrum.flatten()))
    assert long > 1.5 * short


@pytest.mark.parametrize(("severity", "blocks"), [(1, 39), (2, 32), (3, 26), (4, 20), (5, 16)])
def test_pixelate_makes_blocks(severity: int, blocks: int) -> None:
    pixelated = corrupted(Image.radial_gradient("L").resize((64, 64)).convert("RGB"), "pixelate", severity)
    assert (np.diff(pixelated, axis=0) != 0).any((1, 2)).sum() == blocks - 1


def test_elastic_moves_points_by_the_given_distance() -> None:
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    moved = corrupted(Image.fromarray(ramp).convert("RGB"), "elastic", 3)[..., 0] - ramp.astype(int)
    # The ramp is mirrored beyond the edge. Few points move independently, hence the wide tolerance.
    assert moved[:, 20:-20].std() == pytest.approx(3, rel=0.3)


def test_rotation_by_90_degrees_moves_pixels_unchanged(photograph: Image.Image) -> None:
    square = photograph.crop((0, 0, 64, 64))
    assert np.array_equal(corrupted(square, "rotation"), np.rot90(np.asarray(square)))


@pytest.mark.parametrize(("name", "severity"), [("rotation", 3), ("elastic", 5)])
def test_rotation_and_elastic_leave_no_black_corners(name: str, severity: int) -> None:
    assert corrupted(grey(255, 48), name, severity).min() >= 254


@pytest.mark.parametrize("brightness", [0, 255])
def test_blend_is_the_difference_to_a_crop_of_a_photograph(brightness: int) -> None:
    blended = corrupted(grey(brightness, 24), "blend")
    crop = np.abs(blended - brightness).astype(np.uint8)
    windows = [
        np.lib.stride_tricks.sliding_window_view(whole, (1, 24, 3))[..., 0, 0, :, :]
        for whole in load_sample_images().images
    ]
    assert any((window == crop[0]).all((-1, -2)).any() for window in windows)


@pytest.mark.parametrize("size", [(8, 8), (33, 17)])
@pytest.mark.parametrize("name", [name for members in CORRUPTIONS.values() for name in members])
def test_corruptions_keep_the_size_of_small_and_oblong_images(name: str, size: tuple[int, int]) -> None:
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8)
    assert corrupted(Image.fromarray(pixels.numpy()), name).shape == pixels.shape


# Pixelate is excluded: at half of the pixels all blocks are equal, which is closer to the image than uneven blocks.
GROWING = [
    name for family in ("noise", "blur", "weather", "digital") for name in FAMILIES[family] if name != "pixelate"
]


def test_every_corruption_is_in_one_family() -> None:
    assert sorted(name for family in FAMILIES.values() for name in family) == list(SHIFTS)


@pytest.mark.parametrize("name", SHIFTS)
def test_shift_changes_an_image_the_same_way_each_time(name: str, photograph: Image.Image) -> None:
    first = corrupted(photograph, name)
    assert first.shape == (64, 96, 3)
    assert not np.array_equal(first, np.asarray(photograph))
    assert np.array_equal(first, corrupted(photograph, name))


@pytest.mark.parametrize("name", GROWING)
def test_higher_severity_changes_an_image_more(name: str, photograph: Image.Image) -> None:
    distances = [
        np.abs(corrupted(photograph, name, severity) - np.asarray(photograph)).mean() for severity in range(1, 6)
    ]
    assert distances == sorted(set(distances))
    assert np.array_equal(corrupted(photograph, name), corrupted(photograph, name, 5))


def test_blend_uses_different_crops_for_different_images() -> None:
    task = load_task("digits", shift="blend", image_size=16)
    target = task.targets[0]
    first, second = (
        np.asarray(target.test[i]["image"]).astype(int) - np.asarray(task.source.test[i]["image"]) for i in (0, 1)
    )
    assert not np.array_equal(first[:2], second[:2])


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("contrst", None, "expected one of blend, .*; did you mean contrast"),
        ("contrast", 6, "must be 1 to 5, found 6"),
        ("contrast", 0, "must be 1 to 5, found 0"),
        ("invert", 2, "has no severities"),
    ],
)
def test_unknown_names_and_severities_are_refused(name: str, severity: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shift(name, severity)
