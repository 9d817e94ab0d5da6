"""The embedded benchmarks: distance fields, rendered shapes, enlarged digits."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from peft_edge.data import load_task
from peft_edge.data.embedded import (
    BASE_CLASSES,
    EXTENT,
    RESOLUTION,
    UNSEEN_CLASSES,
    coverage,
    distance_fields,
    load_digits_domain,
    render_shapes,
)
from tests.data.conftest import pixels_of

CELL_AREA = (2 * EXTENT / (RESOLUTION - 1)) ** 2

# Closed formulas for the areas, in squared radii.
AREAS = {
    "triangle": 3 * math.sqrt(3) / 4,
    "square": 1.5**2,
    "frame": 1.78**2 - 1.22**2 - (4 - math.pi) * 0.14**2,
    "pentagon": 2.5 * math.sin(2 * math.pi / 5),
    "star": 10 * 0.42 * math.sin(math.pi / 5) / 2,
    "bar": 1.0,
    "plus": 2 * 1.9 * 0.56 - 0.56**2,
    "tee": 1.6 * 0.45 + 0.44 * 1.35,
    "aitch": 2 * 0.4 * 1.7 + 0.7 * 0.4,
    "disc": math.pi * 0.85**2,
    "ring": math.pi * (0.99**2 - 0.71**2),
}


def test_there_are_12_base_and_8_unseen_classes() -> None:
    assert len(BASE_CLASSES) == 12
    assert len(UNSEEN_CLASSES) == 8
    assert tuple(distance_fields()) == BASE_CLASSES + UNSEEN_CLASSES


@pytest.mark.parametrize("name", AREAS)
def test_field_is_negative_over_the_area_of_the_shape(name: str) -> None:
    # The step is smoothed over one grid cell, so that cells on the edge count by their covered share.
    share = (0.5 - distance_fields()[name] / math.sqrt(CELL_AREA)).clamp(0, 1)
    assert share.sum().item() * CELL_AREA == pytest.approx(AREAS[name], rel=0.01)


@pytest.mark.parametrize("name", BASE_CLASSES + UNSEEN_CLASSES)
def test_field_has_slope_one(name: str) -> None:
    down, right = torch.gradient(distance_fields()[name], spacing=2 * EXTENT / (RESOLUTION - 1))
    assert max(down.abs().max(), right.abs().max()) <= 1 + 1e-4
    # The slope is undefined where two edges are equally near.
    assert (torch.hypot(down, right) - 1).abs().lt(0.02).float().mean().item() > 0.95


def test_no_shape_equals_another_one_turned_by_90_degrees() -> None:
    masks = {name: field < 0 for name, field in distance_fields().items()}
    for one, other in combinations(masks, 2):
        for turns in range(4):
            turned = torch.rot90(masks[one], turns)
            overlap = (turned & masks[other]).sum() / (turned | masks[other]).sum()
            assert overlap < 0.9, (one, other, turns)


def drawn(name: str, *, scale: float = 0.5, offset: tuple[float, float] = (0, 0), angle: float = 0, shear: float = 0):
    pose = [torch.tensor([value]) for value in (scale, offset, angle, shear)]
    return coverage(distance_fields()[name][None, None], *pose, size=96)[0, 0]


@pytest.mark.parametrize("shear", [0, 0.25])
def test_coverage_has_the_area_and_position_of_the_shape(shear: float) -> None:
    image = drawn("square", scale=0.4, offset=(0.2, -0.1), angle=0.3, shear=shear)
    assert image.sum().item() == pytest.approx(AREAS["square"] * 0.4**2 * 48**2, rel=0.02)
    side = (torch.arange(96) + 0.5) / 48 - 1
    right, down = (image.sum(0) * side).sum() / image.sum(), (image.sum(1) * side).sum() / image.sum()
    assert (right.item(), down.item()) == pytest.approx((0.2, -0.1), abs=0.002)


def test_positive_angle_turns_clockwise() -> None:
    upright, turned = drawn("arrow"), drawn("arrow", angle=math.pi / 2)
    assert (torch.rot90(upright, -1) - turned).abs().max() < 0.02


def test_edges_are_anti_aliased() -> None:
    image = drawn("disc", scale=0.8)
    partial = ((image > 0.01) & (image < 0.99)).sum().item()
    # The edge is about one pixel wide along the whole circumference.
    assert 0.8 < partial / (2 * math.pi * 0.85 * 0.8 * 48) < 1.2


def render(count: int, *, seed: int, image_size: int = 32) -> Dataset:
    return render_shapes(count, image_size, torch.Generator().manual_seed(seed))


def test_shapes_have_equally_many_images_per_class() -> None:
    assert Counter(render(60, seed=0)["label"]) == dict.fromkeys(range(20), 3)


def test_shapes_are_determined_by_the_seed() -> None:
    assert np.array_equal(pixels_of(render(40, seed=3)), pixels_of(render(40, seed=3)))
    assert not np.array_equal(pixels_of(render(40, seed=3)), pixels_of(render(40, seed=4)))


def test_shapes_vary_and_have_the_given_size() -> None:
    images = pixels_of(render(200, seed=0, image_size=24))
    assert images.shape == (200, 24, 24, 3)
    assert images.mean((1, 2)).std(0).min() > 20
    assert len(np.unique(images)) == 256


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    source, adaptation = load_digits_domain(image_size=48, seed=0)
    return {**vars(source), "adaptation": adaptation}


def test_digits_splits_are_stratified_and_have_the_documented_sizes(splits: dict[str, Dataset]) -> None:
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 700, "adaptation": 400, "validation": 150, "test": 547
    }  # fmt: skip
    for split in splits.values():
        counts = Counter(split["label"])
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 0.05 * len(split)


def test_every_digit_is_in_one_split_and_enlarged_as_by_pillow(splits: dict[str, Dataset]) -> None:
    images = (
        np.concatenate([pixels_of(split)[..., 0] for split in splits.values()]).reshape(1797, -1).astype(np.float32)
    )
    labels = np.concatenate([split["label"] for split in splits.values()])
    digits = load_digits()
    grey = (Image.fromarray((digit * 255 / 16).astype(np.float32)) for digit in digits.images)
    expected = np.stack([np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in grey])
    expected = expected.clip(0, 255).reshape(1797, -1)
    nearest = ((expected**2).sum(1)[:, None] - 2 * expected @ images.T + (images**2).sum(1)).argmin(axis=1)
    assert sorted(nearest) == list(range(1797))
    assert (labels[nearest] == digits.target).all()
    assert np.abs(images[nearest] - expected).max() <= 1


def test_digits_are_grey_and_have_the_given_size() -> None:
    source, _ = load_digits_domain(image_size=20, seed=0)
    image = np.asarray(source.test[0]["image"])
    assert image.shape == (20, 20, 3)
    assert (image == image[..., :1]).all()


def test_digits_splits_depend_on_the_seed(splits: dict[str, Dataset]) -> None:
    again, _ = load_digits_domain(image_size=48, seed=0)
    other, _ = load_digits_domain(image_size=48, seed=1)
    assert np.array_equal(pixels_of(again.test), pixels_of(splits["test"]))
    assert not np.array_equal(pixels_of(other.test), pixels_of(splits["test"]))


def test_source_and_target_have_the_same_test_digits() -> None:
    task = load_task("digits", shift="invert")
    assert task.source.test["label"] == task.targets[0].test["label"]
    assert np.array_equal(pixels_of(task.targets[0].test), 255 - pixels_of(task.source.test))
