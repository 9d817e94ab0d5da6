"""What an exported file answers, beside the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_edge.export.formats import Network
from peft_edge.profiling.tables import text_table

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
