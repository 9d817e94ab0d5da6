"""Batches of a split, prepared as a backbone expects them."""

from __future__ import annotations

from datasets import Dataset
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.config import RunConfig
from peft_edge.data import build_loader, build_transform


def training_batches(config: RunConfig, backbone: nn.Module, images: Dataset, *, batch_size: int) -> DataLoader:
    """Shuffled and augmented batches of `batch_size` images over all processes; an incomplete last one is left out."""
    return _batches(config, backbone, images, train=True, batch_size=batch_size)


def evaluation_batches(config: RunConfig, backbone: nn.Module, images: Dataset) -> DataLoader:
    """All images, in order and as they are."""
    return _batches(config, backbone, images, train=False, batch_size=config.training.eval_batch_size)


def _batches(config: RunConfig, backbone: nn.Module, images: Dataset, *, train: bool, batch_size: int) -> DataLoader:
    size = config.data.image_size
    data_config = {**resolve_model_data_config(backbone), "input_size": (3, size, size)}
    transform = build_transform(data_config, train=train)
    return build_loader(
        images, transform, batch_size=batch_size, shuffle=train, seed=config.seed, num_workers=config.num_workers
    )
