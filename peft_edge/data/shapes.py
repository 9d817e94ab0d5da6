"""A larger benchmark: 20 classes of rendered shapes. The images are SYNTHETIC, made in seconds from a seed.

Each shape's signed distance field is tabulated once; an image samples the tables under a random pose, so its edges are
anti-aliased at any size. Pose, shear, colours, background, clutter, lighting and sensor noise vary.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from peft_edge.data.arrays import dataset_from_arrays
from peft_edge.data.distance_fields import FIELDS, coverage
from peft_edge.data.task import Domain

SPLIT_SIZES = {"source": 20_000, "adaptation": 512, "validation": 500, "test": 2_000}

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
    splits = _splits(tuple(SPLIT_SIZES.items()), image_size, seed)
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
