"""Signed distance fields of the shapes, tabulated on a grid, and drawn from it in any pose.

A field is negative inside its shape and positive outside; its unit is the radius of the shape's surrounding circle. No
shape, turned by 90 degrees, is another one of them.

A larger benchmark: 20 classes of rendered shapes. The images are SYNTHETIC, made in seconds from a seed.

Each shape's signed distance field is tabulated once; an image samples the tables under a random pose, so its edges are
anti-aliased at any size. Pose, shear, colours, background, clutter, lighting and sensor noise vary.

The default benchmark: scikit-learn's 1,797 handwritten digits, drawn large.

They are the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), 8 x 8 pixels and
17 grey levels, and are installed with scikit-learn, so they need no network.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from peft_edge.data.domain import Domain, dataset_from_arrays, stratified_split

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


SHAPES_SPLIT_SIZES = {"source": 20_000, "adaptation": 512, "validation": 500, "test": 2_000}

CLUTTER = 3
BATCH = 100


def load_shapes_domain(*, image_size: int, seed: int) -> tuple[Domain, Dataset]:
    """Renders 20,000 source, 512 adaptation, 500 validation and 2,000 test images, classes in equal shares.

    Args:
        image_size: The height and width of the images in pixels.
        seed: Every random choice follows from it.

    Returns:
        The source domain, and the adaptation images without their shift.
    """
    splits = _splits(tuple(SHAPES_SPLIT_SIZES.items()), image_size, seed)
    source = Domain(train=splits["source"], validation=splits["validation"], test=splits["test"])
    return source, splits["adaptation"]


@lru_cache(maxsize=1)
def _splits(sizes: tuple[tuple[str, int], ...], image_size: int, seed: int) -> dict[str, Dataset]:
    """Rendering takes ten seconds, which the runs of a study in one process need not each wait for."""
    generator = torch.Generator().manual_seed(seed)
    return {name: render_shapes(size, image_size, generator) for name, size in sizes}


def render_shapes(count: int, image_size: int, generator: torch.Generator) -> Dataset:
    """Renders `count` images, of each class in turn.

    Args:
        count: The number of images.
        image_size: Their height and width in pixels.
        generator: The source of every random choice.

    Returns:
        A dataset with the columns `image` and `label`.
    """
    names = list(FIELDS)
    tables = torch.stack(list(FIELDS.values())).unsqueeze(1)
    labels = torch.arange(count) % len(names)
    # In batches, so that the planes being worked on stay in the processor's cache.
    images = torch.cat([_render(part, tables, image_size, generator) for part in labels.split(BATCH)])
    return dataset_from_arrays(images, labels, names)


def _render(labels: Tensor, tables: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns (N, size, size, 3) uint8 images of the classes in `labels`."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    def draw(canvas: Tensor, fields: Tensor, scale: Tensor, offset: Tensor, angle: Tensor, colour: Tensor) -> Tensor:
        share = coverage(fields, scale, offset, angle, uniform(-0.25, 0.25), size)
        return torch.lerp(canvas, colour[..., None, None], share)

    # A background of smooth patches; the clutter, and then the shape, stand out from it in brightness.
    base = uniform(0.15, 0.85, 3)
    patches = F.interpolate(uniform(-0.2, 0.2, 3, 4, 4), size=(size, size), mode="bilinear")
    canvas = base[..., None, None] + patches
    for _ in range(CLUTTER):
        kinds = torch.randint(len(tables), (count,), generator=generator)
        canvas = draw(
            canvas, tables[kinds], uniform(0.06, 0.16), uniform(-1, 1, 2), uniform(-math.pi, math.pi), uniform(0, 1, 3)
        )
    away = torch.where(base.mean(1) > 0.5, -1.0, 1.0)[:, None]
    colour = (base + away * uniform(0.3, 0.7, 1) + uniform(-0.15, 0.15, 3)).clamp(0, 1)
    canvas = draw(canvas, tables[labels], uniform(0.45, 0.85), uniform(-0.2, 0.2, 2), uniform(-0.6, 0.6), colour)

    # Light falls from one side, at its own strength, onto a sensor with noise.
    side = torch.linspace(-1, 1, size)
    slope = uniform(-0.3, 0.3, 2)
    light = 1 + slope[:, 0, None, None] * side[:, None] + slope[:, 1, None, None] * side
    canvas = canvas * (light * uniform(0.6, 1.2, 1, 1)).unsqueeze(1)
    canvas += torch.randn(canvas.shape, generator=generator) * uniform(0, 0.05, 1, 1, 1)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


DIGITS_SPLIT_SIZES = {"adaptation": 400, "validation": 150, "test": 547}


def load_digits_domain(*, image_size: int, seed: int) -> tuple[Domain, Dataset]:
    """Splits the digits, stratified by seed: 700 source, 400 adaptation, 150 validation and 547 test images.

    Args:
        image_size: The height and width of the images in pixels.
        seed: Which digit is in which split.

    Returns:
        The source domain, and the adaptation images without their shift.
    """
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(grey, size=(image_size, image_size), mode="bicubic", antialias=True)
    images = large.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    names = [str(digit) for digit in digits.target_names]
    rest = dataset_from_arrays(images, torch.from_numpy(digits.target), names)
    splits = {}
    for name, size in DIGITS_SPLIT_SIZES.items():
        rest, splits[name] = stratified_split(rest, size, seed=seed)
    return Domain(train=rest, validation=splits["validation"], test=splits["test"]), splits["adaptation"]
