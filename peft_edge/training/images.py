"""Batches of a split, prepared as a backbone expects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.config import RunConfig
from peft_edge.data import build_loader, build_transform


def training_batches(config: RunConfig, backbone: nn.Module, images: Dataset, *, batch_size: int) -> DataLoader:
    """Shuffled and augmented batches of `batch_size` images over all processes; an incomplete last one is left out."""
    return _batches(config, backbone, images, train=True, shuffle=True, batch_size=batch_size)


def evaluation_batches(config: RunConfig, backbone: nn.Module, images: Dataset) -> DataLoader:
    """All images, in order and as they are."""
    return _batches(config, backbone, images, train=False, shuffle=False, batch_size=config.training.eval_batch_size)


def views(config: RunConfig, backbone: nn.Module, images: Dataset) -> Callable[[int], DataLoader]:
    """From the number of a view to all images, in order and augmented as in the epoch of that number."""
    loader = _batches(config, backbone, images, train=True, shuffle=False, batch_size=config.training.eval_batch_size)

    def view(number: int) -> DataLoader:
        sampler: Any = loader.sampler
        sampler.set_epoch(number)
        return loader

    return view


def data_config(config: RunConfig, backbone: nn.Module) -> dict[str, Any]:
    """How the backbone expects its images, in timm's terms, at the size of the run."""
    size = config.data.image_size
    return {**resolve_model_data_config(backbone), "input_size": (3, size, size)}


def _batches(
    config: RunConfig, backbone: nn.Module, images: Dataset, *, train: bool, shuffle: bool, batch_size: int
) -> DataLoader:
    transform = build_transform(data_config(config, backbone), train=train)
    return build_loader(
        images, transform, batch_size=batch_size, shuffle=shuffle, seed=config.seed, num_workers=config.num_workers
    )
