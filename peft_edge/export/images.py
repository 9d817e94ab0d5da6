"""Real images to compare a file with its model on, and to choose the scales of integers by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from peft_edge.backbones import class_names
from peft_edge.data import Domain, build_transform
from peft_edge.data.load import EMBEDDED
from peft_edge.data.sources import domain_from_splits, read_splits

CALIBRATION_SIZE = 100
COMPARISON_SIZE = 256


class Images(NamedTuple):
    """Images as a network expects them."""

    calibration: Tensor
    """(N, 3, H, W), to choose scales by: at most 100 of the training images."""

    comparison: Tensor
    """(M, 3, H, W): at most 256 of the test images."""

    labels: Tensor | None
    """(M,), the network's classes of `comparison`; None where the data has classes that the network does not name."""


def read_images(name: str, model: nn.Module, *, image_size: int | None = None) -> Images:
    """Reads images and prepares them as the model is evaluated.

    Args:
        name: `digits`, `shapes`, a folder with one subfolder for each class, or a Hugging Face dataset.
        model: A timm model, or a PEFT model of one.
        image_size: Height and width in pixels; by default what timm evaluates the model at.

    Raises:
        ValueError: No such data or size, an unreadable image, or too few.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, found {image_size}")
    config = data_config(model, image_size)
    domain = _read_domain(name, config["input_size"][-1])
    transform = build_transform(config, train=False)

    def prepared(images: Dataset) -> Tensor:
        return torch.stack([transform(image) for image in images["image"]])

    test = _some(domain.test, COMPARISON_SIZE)
    return Images(
        calibration=prepared(_some(domain.train, CALIBRATION_SIZE)),
        comparison=prepared(test),
        labels=_labels(test["label"][:], domain.class_names, class_names(model)),
    )


def data_config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """How the model expects its images, in timm's terms."""
    config = resolve_model_data_config(model)
    return config if image_size is None else {**config, "input_size": (3, image_size, image_size)}


def _read_domain(name: str, image_size: int) -> Domain:
    if name in EMBEDDED:
        return EMBEDDED[name](image_size=image_size, seed=0)[0]
    if not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: expected a folder with one subfolder of images for each class, found nothing there")
    return domain_from_splits(name, read_splits(name), train_split="train", seed=0)


def _some(images: Dataset, size: int) -> Dataset:
    return images.shuffle(seed=0).select(range(min(size, len(images))))


def _labels(labels: list[int], names: list[str], known: list[str] | None) -> Tensor | None:
    if known is None or not set(names) <= set(known):
        return None
    return torch.tensor([known.index(names[label]) for label in labels])
