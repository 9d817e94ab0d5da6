from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from peft_edge.data.distance_fields import BASE_CLASSES, EXTENT, FIELDS, RESOLUTION, UNSEEN_CLASSES, coverage

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
    assert tuple(FIELDS) == BASE_CLASSES + UNSEEN_CLASSES


@pytest.mark.parametrize("name", AREAS)
def test_a_field_is_negative_over_the_area_of_its_shape(name: str) -> None:
    # Smoothing the step over one cell counts the cells on the edge by their share.
    share = (0.5 - FIELDS[name] / math.sqrt(CELL_AREA)).clamp(0, 1)
    assert share.sum().item() * CELL_AREA == pytest.approx(AREAS[name], rel=0.01)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_by_one_per_unit_of_distance(name: str) -> None:
    down, right = torch.gradient(FIELDS[name], spacing=2 * EXTENT / (RESOLUTION - 1))
    assert max(down.abs().max(), right.abs().max()) <= 1 + 1e-4
    # Where two edges are equally near, the slope is not defined.
    assert (torch.hypot(down, right) - 1).abs().lt(0.02).float().mean().item() > 0.95


def test_no_shape_turned_by_90_degrees_is_another_one() -> None:
    masks = {name: field < 0 for name, field in FIELDS.items()}
    for one, other in combinations(masks, 2):
        for turns in range(4):
            turned = torch.rot90(masks[one], turns)
            overlap = (turned & masks[other]).sum() / (turned | masks[other]).sum()
            assert overlap < 0.9, (one, other, turns)


def drawn(name: str, *, scale: float = 0.5, offset: tuple[float, float] = (0, 0), angle: float = 0, shear: float = 0):
    pose = [torch.tensor([value]) for value in (scale, offset, angle, shear)]
    return coverage(FIELDS[name][None, None], *pose, size=96)[0, 0]


@pytest.mark.parametrize("shear", [0, 0.25])
def test_a_drawn_shape_covers_its_area_at_its_place(shear: float) -> None:
    image = drawn("square", scale=0.4, offset=(0.2, -0.1), angle=0.3, shear=shear)
    assert image.sum().item() == pytest.approx(AREAS["square"] * 0.4**2 * 48**2, rel=0.02)
    side = (torch.arange(96) + 0.5) / 48 - 1
    right, down = (image.sum(0) * side).sum() / image.sum(), (image.sum(1) * side).sum() / image.sum()
    assert (right.item(), down.item()) == pytest.approx((0.2, -0.1), abs=0.002)


def test_an_angle_turns_clockwise() -> None:
    upright, turned = drawn("arrow"), drawn("arrow", angle=math.pi / 2)
    assert (torch.rot90(upright, -1) - turned).abs().max() < 0.02


def test_edges_are_smooth() -> None:
    image = drawn("disc", scale=0.8)
    partial = ((image > 0.01) & (image < 0.99)).sum().item()
    # About one pixel across, all along the circumference.
    assert 0.8 < partial / (2 * math.pi * 0.85 * 0.8 * 48) < 1.2
