from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from datasets import Dataset

from peft_edge.data.shapes import render_shapes


def render(count: int, *, seed: int, image_size: int = 32) -> Dataset:
    return render_shapes(count, image_size, torch.Generator().manual_seed(seed))


def pixels(split: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in split["image"]])


def test_the_classes_have_equal_shares() -> None:
    assert Counter(render(60, seed=0)["label"]) == dict.fromkeys(range(20), 3)


def test_the_seed_decides_every_pixel() -> None:
    assert np.array_equal(pixels(render(40, seed=3)), pixels(render(40, seed=3)))
    assert not np.array_equal(pixels(render(40, seed=3)), pixels(render(40, seed=4)))


def test_the_images_vary_and_are_of_the_asked_size() -> None:
    images = pixels(render(200, seed=0, image_size=24))
    assert images.shape == (200, 24, 24, 3)
    assert images.mean((1, 2)).std(0).min() > 20
    assert len(np.unique(images)) == 256
