"""Fixtures that create small image folders and datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from peft_edge.data.domain import dataset_from_arrays

ImageFolder = Callable[..., Path]


def pixels_of(split: Dataset) -> np.ndarray:
    """Return the pixels of all images in a split as an array (N, H, W, 3)."""
    return np.stack([np.asarray(image) for image in split["image"]]).astype(int)


@pytest.fixture
def image_folder(tmp_path: Path) -> ImageFolder:
    """Return a function that creates a folder of random 20 x 16 PNG images, with one subfolder for each class."""

    def make(name: str, classes: list[str], *, count: int = 12, splits: tuple[str, ...] = ("",)) -> Path:
        rng = np.random.default_rng(len(name))
        for split in splits:
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for index in range(count):
                    image = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
                    Image.fromarray(image).save(folder / f"{index}.png")
        return tmp_path / name

    return make


@pytest.fixture
def random_images() -> Callable[..., Dataset]:
    """Return a function that creates a dataset of random 16 x 16 images.

    The images belong to the classes in turn: image i has the class i modulo the number of classes.
    """

    def make(count: int, class_names: list[str], *, seed: int = 0) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
        return dataset_from_arrays(images, torch.arange(count) % len(class_names), class_names)

    return make
