"""The embedded benchmarks `digits` (real) and `shapes` (synthetic), which need no download.

`digits` contains the 1,797 handwritten digits of scikit-learn, which are the test set of UCI's "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak 1998). The original images have 8 x 8 pixels and 17 grey levels. They are
enlarged.

`shapes` contains rendered images of 20 classes, with random pose, shear, colours, background, clutter, lighting and
sensor noise. For each class, a table of signed distances to the outline of the shape is computed once. The renderer
samples this table at random poses.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from peft_edge.data.domain import Domain, dataset_from_arrays, stratified_split
from peft_edge.files import requires_extra

DIGITS_SPLIT_SIZES = {"adaptation": 400, "validation": 150, "test": 547}
"""The number of images in each of these splits of `digits`. The source model is trained on the remaining 700 images."""

SHAPES_SPLIT_SIZES = {"source": 20_000, "adaptation": 512, "validation": 500, "test": 2_000}

BASE_CLASSES = (
    "triangle", "square", "star", "arrow", "tee", "cup", "plus", "zed", "disc", "ring", "crescent", "heart",
)  # fmt: skip
UNSEEN_CLASSES = ("pentagon", "bar", "chevron", "ell", "aitch", "frame", "half-disc", "drop")

EXTENT = 1.5
RESOLUTION = 129
"""The number of rows and of columns in each table of signed distances.

Rows and columns are at evenly spaced coordinates from -EXTENT to EXTENT. In these coordinates, a shape has a radius of
about 1.
"""

_Points = list[tuple[float, float]]
_NUM_CLUTTER = 3
_RENDER_BATCH = 100


def load_digits_domain(*, image_size: int, seed: int) -> tuple[Domain, Dataset]:
    """Load `digits`, enlarged to `image_size` x `image_size` pixels. All splits have the same class proportions.

    Returns:
        The source domain (700 training, 150 validation and 547 test images), and a dataset of 400 images to adapt to.
        No image is corrupted yet.
    """
    with requires_extra("train"):
        from sklearn.datasets import load_digits

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


def load_shapes_domain(*, image_size: int, seed: int) -> tuple[Domain, Dataset]:
    """Render `shapes`. The same `seed` gives the same pixels.

    In each split, the numbers of images of any two classes differ by at most one.

    Returns:
        The source domain (20,000 training, 500 validation and 2,000 test images), and a dataset of 512 images to adapt
        to. No image is corrupted yet.
    """
    splits = _render_splits(tuple(SHAPES_SPLIT_SIZES.items()), image_size, seed)
    source = Domain(train=splits["source"], validation=splits["validation"], test=splits["test"])
    return source, splits["adaptation"]


@lru_cache(maxsize=1)  # rendering takes ten seconds, and many runs of a study use the same images
def _render_splits(sizes: tuple[tuple[str, int], ...], image_size: int, seed: int) -> dict[str, Dataset]:
    generator = torch.Generator().manual_seed(seed)
    return {name: render_shapes(size, image_size, generator) for name, size in sizes}


def render_shapes(count: int, image_size: int, generator: torch.Generator) -> Dataset:
    """Render `count` images as an in-memory dataset. The labels are 0, 1, ..., 19, 0, 1, ..."""
    fields = distance_fields()
    tables = torch.stack(list(fields.values())).unsqueeze(1)
    labels = torch.arange(count) % len(fields)
    # Render in small batches, whose tensors fit into the processor's cache.
    images = torch.cat([_render(part, tables, image_size, generator) for part in labels.split(_RENDER_BATCH)])
    return dataset_from_arrays(images, labels, list(fields))


def _render(labels: Tensor, tables: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Render one image for each label, as uint8 of shape (N, size, size, 3)."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    def draw(canvas: Tensor, fields: Tensor, scale: Tensor, offset: Tensor, angle: Tensor, colour: Tensor) -> Tensor:
        covered = coverage(fields, scale, offset, angle, uniform(-0.25, 0.25), size)
        return torch.lerp(canvas, colour[..., None, None], covered)

    # Background: smooth patches of colour.
    base = uniform(0.15, 0.85, 3)
    patches = F.interpolate(uniform(-0.2, 0.2, 3, 4, 4), size=(size, size), mode="bilinear")
    canvas = base[..., None, None] + patches
    # Clutter: small random shapes.
    for _ in range(_NUM_CLUTTER):
        kinds = torch.randint(len(tables), (count,), generator=generator)
        canvas = draw(
            canvas, tables[kinds], uniform(0.06, 0.16), uniform(-1, 1, 2), uniform(-math.pi, math.pi), uniform(0, 1, 3)
        )
    # The labelled shape: brighter than a dark background, darker than a bright background.
    away = torch.where(base.mean(1) > 0.5, -1.0, 1.0)[:, None]
    colour = (base + away * uniform(0.3, 0.7, 1) + uniform(-0.15, 0.15, 3)).clamp(0, 1)
    canvas = draw(canvas, tables[labels], uniform(0.45, 0.85), uniform(-0.2, 0.2, 2), uniform(-0.6, 0.6), colour)
    # Lighting: a linear gradient of random direction and strength. Then sensor noise.
    side = torch.linspace(-1, 1, size)
    slope = uniform(-0.3, 0.3, 2)
    light = 1 + slope[:, 0, None, None] * side[:, None] + slope[:, 1, None, None] * side
    canvas = canvas * (light * uniform(0.6, 1.2, 1, 1)).unsqueeze(1)
    canvas += torch.randn(canvas.shape, generator=generator) * uniform(0, 0.05, 1, 1, 1)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def coverage(fields: Tensor, scale: Tensor, offset: Tensor, angle: Tensor, shear: Tensor, size: int) -> Tensor:
    """Return a tensor (N, 1, size, size) with the fraction of each pixel, from 0 to 1, that the drawn shape covers.

    Each point (u, v) of the shape is sheared to (u + shear * v, v), rotated by `angle`, multiplied by `scale` and moved
    by `offset`. Lengths are in units of `size / 2` pixels. The origin is the centre of the image.

    Args:
        fields: (N, 1, RESOLUTION, RESOLUTION), signed distances, which are negative inside the shape.
        scale: (N,), the factor by which the shape is enlarged.
        offset: (N, 2), the distances by which the shape is moved from the centre to the right and downwards.
        angle: (N,), the clockwise rotation in radians.
        shear: (N,), the shift of u per unit of v.
        size: Height and width of the image in pixels.
    """
    # Sample `fields` at pixel centres, so that a shape has the same place in images of any size.
    side = (torch.arange(size) + 0.5) * (2 / size) - 1
    x = side - offset[:, 0, None, None]
    y = side[:, None] - offset[:, 1, None, None]
    cos, sin = (angle.cos() / scale)[:, None, None], (angle.sin() / scale)[:, None, None]
    v = cos * y - sin * x
    u = cos * x + sin * y - shear[:, None, None] * v
    grid = torch.stack([u, v], dim=-1) / EXTENT
    distance = F.grid_sample(fields, grid, padding_mode="border", align_corners=True)
    return (0.5 - distance * (scale * size / 2)[:, None, None, None]).clamp(0, 1)


@cache
def distance_fields() -> dict[str, Tensor]:
    """Return a dict from class name to a (RESOLUTION, RESOLUTION) tensor of signed distances to the outline of a shape.

    Distances are negative inside the shape. BASE_CLASSES come before UNSEEN_CLASSES. No shape looks like another shape
    after a rotation by 90 degrees.
    """
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


def _disc(x: Tensor, y: Tensor, radius: float = 0.85) -> Tensor:
    return torch.hypot(x, y) - radius


def _polygon(x: Tensor, y: Tensor, corners: _Points) -> Tensor:
    """Return the signed distance of each point (x, y) to a polygon. Distances inside the polygon are negative.

    A point is inside if a ray to the right crosses an odd number of edges.
    """
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return torch.where(inside, -nearest, nearest)


def _regular(corners: int, inner: float = 1.0) -> _Points:
    """Return the corners of a regular polygon or star, clockwise from the top.

    The distances of the corners from the centre alternate between 1 and `inner`.
    """
    radii = [1.0 if corner % 2 == 0 else inner for corner in range(corners)]
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


# Each polygon lists its corners (x, y) in order. x increases to the right, and y increases downwards.
_POLYGONS: dict[str, _Points] = {
    "triangle": _regular(3),
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "pentagon": _regular(5),
    "star": _regular(10, inner=0.42),
    "bar": [(-0.25, -1), (0.25, -1), (0.25, 1), (-0.25, 1)],
    "arrow": [(0, -1), (0.75, -0.15), (0.28, -0.15), (0.28, 1), (-0.28, 1), (-0.28, -0.15), (-0.75, -0.15)],
    "chevron": [(0, -0.75), (0.9, 0.15), (0.9, 0.75), (0, -0.1), (-0.9, 0.75), (-0.9, 0.15)],
    "ell": [(-0.65, -0.9), (-0.2, -0.9), (-0.2, 0.45), (0.65, 0.45), (0.65, 0.9), (-0.65, 0.9)],
    "tee": [(-0.8, -0.9), (0.8, -0.9), (0.8, -0.45), (0.22, -0.45), (0.22, 0.9), (-0.22, 0.9), (-0.22, -0.45),
            (-0.8, -0.45)],
    "cup": [(-0.8, -0.8), (-0.4, -0.8), (-0.4, 0.4), (0.4, 0.4), (0.4, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "plus": [(-0.28, -0.95), (0.28, -0.95), (0.28, -0.28), (0.95, -0.28), (0.95, 0.28), (0.28, 0.28),
             (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.28), (-0.95, 0.28), (-0.95, -0.28), (-0.28, -0.28)],
    "zed": [(-0.8, -0.85), (0.8, -0.85), (0.8, -0.5), (-0.15, 0.45), (0.8, 0.45), (0.8, 0.85),
            (-0.8, 0.85), (-0.8, 0.5), (0.15, -0.45), (-0.8, -0.45)],
    "aitch": [(-0.75, -0.85), (-0.35, -0.85), (-0.35, -0.2), (0.35, -0.2), (0.35, -0.85), (0.75, -0.85),
              (0.75, 0.85), (0.35, 0.85), (0.35, 0.2), (-0.35, 0.2), (-0.35, 0.85), (-0.75, 0.85)],
}  # fmt: skip
