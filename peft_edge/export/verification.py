"""Real images to compare a file with its model on, and to choose the scales of integers by.

What an exported file answers, beside the model that it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from peft_edge.backbones import class_names
from peft_edge.data import Domain, build_transform
from peft_edge.data.sources import domain_from_splits, read_splits
from peft_edge.data.task import EMBEDDED
from peft_edge.export.formats import Network
from peft_edge.profiling.tables import text_table

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


_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file and its model, on the same images."""

    name: str
    """The file's format, and `int8` if it is quantised."""

    size_bytes: int
    """Of the file."""

    largest_logit: float
    """The model's, by its absolute value."""

    largest_difference: float
    """The largest absolute difference of a logit."""

    same_top1: float
    """The share of images for which the same class comes first."""

    accuracy: float | None
    """The share of images that the file classifies right; None without labels."""

    model_accuracy: float | None
    """The same of the model."""


def answers(network: Network, images: Tensor, batch_size: int | None) -> Tensor:
    """Returns the logits (N, num_classes) of images (N, C, H, W).

    Args:
        network: What answers.
        images: The images.
        batch_size: How many it takes at once, no more and no less; None for any number.
    """
    with torch.no_grad():
        return torch.cat([network(batch) for batch in batches(images, batch_size)])[: len(images)]


def batches(images: Tensor, batch_size: int | None) -> Iterator[Tensor]:
    """Yields images (N, C, H, W) in batches; with a size, the last image fills the last batch up to it."""
    for batch in images.split(batch_size or _BATCH_SIZE):
        missing = (batch_size or len(batch)) - len(batch)
        yield torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)])


def compare(name: str, size_bytes: int, found: Tensor, expected: Tensor, labels: Tensor | None) -> Comparison:
    """Compares the logits of a file with those of its model, both (N, num_classes).

    Args:
        name: The file's format.
        size_bytes: Its size.
        found: Its logits.
        expected: The model's.
        labels: (N,), the right classes, where they are known.
    """
    return Comparison(
        name=name,
        size_bytes=size_bytes,
        largest_logit=expected.abs().max().item(),
        largest_difference=(found - expected).abs().max().item(),
        same_top1=_share(found, expected.argmax(1)),
        accuracy=None if labels is None else _share(found, labels),
        model_accuracy=None if labels is None else _share(expected, labels),
    )


def comparison_table(compared: Sequence[Comparison]) -> str:
    """Returns a line of text for each file, and one for the model where its accuracy is known."""
    rows = [("", "bytes", "largest difference of a logit", "same top-1", "accuracy")]
    if compared[0].model_accuracy is not None:
        rows.append(("PyTorch", "", "", "", _digits(compared[0].model_accuracy)))
    for row in compared:
        difference, top1 = f"{row.largest_difference:.1e}", _digits(row.same_top1)
        rows.append((row.name, f"{row.size_bytes:,}", difference, top1, _digits(row.accuracy)))
    return text_table(rows)


def _share(logits: Tensor, classes: Tensor) -> float:
    return (logits.argmax(1) == classes).float().mean().item()


def _digits(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
