"""Signed distance fields of the shapes, tabulated on a grid, and drawn from it in any pose.

A field is negative inside its shape and positive outside; its unit is the radius of the shape's surrounding circle. No
shape, turned by 90 degrees, is another one of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EXTENT = 1.5
"""The tables reach from -EXTENT to EXTENT in x and y."""

RESOLUTION = 129

BASE_CLASSES = (
    "triangle", "square", "star", "arrow", "tee", "cup", "plus", "zed", "disc", "ring", "crescent", "heart",
)  # fmt: skip
UNSEEN_CLASSES = ("pentagon", "bar", "chevron", "ell", "aitch", "frame", "half-disc", "drop")

Points = list[tuple[float, float]]


def _regular(corners: int, inner: float = 1.0) -> Points:
    """Points on the unit circle, every second one moved in to the radius `inner`, from the top."""
    radii = [1.0 if corner % 2 == 0 else inner for corner in range(corners)]
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


# Corners in order, x to the right and y down.
_POLYGONS: dict[str, Points] = {
    "triangle": _regular(3),
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "pentagon": _regular(5),
    "star": _regular(10, inner=0.42),
    "bar": [(-0.25, -1), (0.25, -1), (0.25, 1), (-0.25, 1)],
    "arrow": [(0, -1), (0.75, -0.15), (0.28, -0.15), (0.28, 1), (-0.28, 1), (-0.28, -0.15), (-0.75, -0.15)],
    "chevron": [(0, -0.75), (0.9, 0.15), (0.9, 0.75), (0, -0.1), (-0.9, 0.75), (-0.9, 0.15)],
    "ell": [(-0.65, -0.9), (-0.2, -0.9), (-0.2, 0.45), (0.65, 0.45), (0.65, 0.9), (-0.65, 0.9)],
    "tee": [
        (-0.8, -0.9), (0.8, -0.9), (0.8, -0.45), (0.22, -0.45),
        (0.22, 0.9), (-0.22, 0.9), (-0.22, -0.45), (-0.8, -0.45),
    ],
    "cup": [(-0.8, -0.8), (-0.4, -0.8), (-0.4, 0.4), (0.4, 0.4), (0.4, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "plus": [
        (-0.28, -0.95), (0.28, -0.95), (0.28, -0.28), (0.95, -0.28), (0.95, 0.28), (0.28, 0.28),
        (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.28), (-0.95, 0.28), (-0.95, -0.28), (-0.28, -0.28),
    ],
    "zed": [
        (-0.8, -0.85), (0.8, -0.85), (0.8, -0.5), (-0.15, 0.45), (0.8, 0.45), (0.8, 0.85),
        (-0.8, 0.85), (-0.8, 0.5), (0.15, -0.45), (-0.8, -0.45),
    ],
    "aitch": [
        (-0.75, -0.85), (-0.35, -0.85), (-0.35, -0.2), (0.35, -0.2), (0.35, -0.85), (0.75, -0.85),
        (0.75, 0.85), (0.35, 0.85), (0.35, 0.2), (-0.35, 0.2), (-0.35, 0.85), (-0.75, 0.85),
    ],
}  # fmt: skip


def _polygon(x: Tensor, y: Tensor, corners: Points) -> Tensor:
    """The exact distance to a polygon's nearest edge, with the sign from how often a ray to the right crosses it."""
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return torch.where(inside, -nearest, nearest)


def _disc(x: Tensor, y: Tensor, radius: float = 0.85) -> Tensor:
    return torch.hypot(x, y) - radius


def _fields() -> dict[str, Tensor]:
    side = torch.linspace(-EXTENT, EXTENT, RESOLUTION)
    y, x = torch.meshgrid(side, side, indexing="ij")
    fields = {name: _polygon(x, y, corners) for name, corners in _POLYGONS.items()}
    disc, square = _disc(x, y), fields["square"]
    lobes = torch.minimum(_disc(x - 0.42, y + 0.3, 0.5), _disc(x + 0.42, y + 0.3, 0.5))
    tip = _polygon(x, y, [(-0.83, -0.02), (0.83, -0.02), (0, 0.95)])
    fields |= {
        "disc": disc,
        "ring": disc.abs().sub(0.14),
        "frame": square.abs().sub(0.14),
        "half-disc": torch.maximum(_disc(x, y + 0.4, 0.95), -y - 0.4),
        "crescent": torch.maximum(disc, -_disc(x - 0.4, y, 0.7)),
        "drop": torch.minimum(_disc(x, y - 0.35, 0.55), _polygon(x, y, [(-0.5, 0.12), (0, -1), (0.5, 0.12)])),
        "heart": torch.minimum(lobes, tip),
    }
    return {name: fields[name] for name in (*BASE_CLASSES, *UNSEEN_CLASSES)}


FIELDS: dict[str, Tensor] = _fields()
"""Class name -> (RESOLUTION, RESOLUTION) table, rows from top to bottom; the base classes come first."""


def coverage(fields: Tensor, scale: Tensor, offset: Tensor, angle: Tensor, shear: Tensor, size: int) -> Tensor:
    """Draws shapes in a pose: a point q of the shape is at scale * rotation * shear * q + offset in the image.

    Args:
        fields: (N, 1, RESOLUTION, RESOLUTION), from `FIELDS`.
        scale: (N,), the shape's radius in halves of the image's side.
        offset: (N, 2), right and down from the centre, in halves of the side.
        angle: (N,), clockwise, in radians.
        shear: (N,), how far x moves per unit of y.
        size: The height and width of the image in pixels.

    Returns:
        (N, 1, size, size), the share of each pixel that the shape covers.
    """
    # Pixel centres, so that a pose means the same at any size.
    side = (torch.arange(size) + 0.5) * (2 / size) - 1
    x = side - offset[:, 0, None, None]
    y = side[:, None] - offset[:, 1, None, None]
    cos, sin = (angle.cos() / scale)[:, None, None], (angle.sin() / scale)[:, None, None]
    v = cos * y - sin * x
    u = cos * x + sin * y - shear[:, None, None] * v
    grid = torch.stack([u, v], dim=-1) / EXTENT
    distance = F.grid_sample(fields, grid, padding_mode="border", align_corners=True)
    return (0.5 - distance * (scale * size / 2)[:, None, None, None]).clamp(0, 1)
