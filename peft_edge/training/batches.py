"""Batches of a split, prepared as a backbone expects them.

Training on stored features: the frozen layers before the first trained one see every image once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_edge.config import RunConfig
from peft_edge.data import Domain, build_loader, build_transform, load_batches
from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.records import StepProfile
from peft_edge.training.run_folder import cache_folder


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


@dataclass(frozen=True)
class Replay:
    """What is trained, and on what, in the place of the model and the images."""

    tail: nn.Module
    """The part of the model behind the prefix; training it trains the model."""

    batches: DataLoader
    """What the prefix makes of the images, as `pixel_values`, and `labels`."""

    info: dict[str, Any]
    """What is stored, and what storing it took."""


def check_replay(config: RunConfig, model: nn.Module) -> None:
    """Checks that there is something to store before what the model trains.

    Raises:
        ValueError: There is not; the message says why.
    """
    try:
        FrozenPrefix(model, _two_images(config, model))
    except ValueError as error:
        raise ValueError(f"training.replay: {error}") from error


def open_replay(
    config: RunConfig, model: nn.Module, source: nn.Module, target: Domain, accelerator: Accelerator
) -> Replay:
    """Stores what a model's frozen prefix makes of the training images, or finds it stored by a run before.

    Args:
        config: The run's configuration.
        model: Prepared for training, its statistics estimated; left as it is.
        source: The source model, which says how images are prepared.
        target: Whose training images.
        accelerator: The run's.

    Raises:
        ValueError: The prefix changes in training, or gives values that cannot be stored.
        OSError: The disk is full.
    """
    settings = config.training
    with accelerator.autocast():
        prefix = FrozenPrefix(model, _two_images(config, model))
        cache = FeatureCache.open(
            cache_folder(config) / "features",
            prefix,
            views(config, source, target.train),
            key=_key(config, source, target, accelerator),
            views=settings.replay_views,
            dtype=settings.replay_dtype,
        )
    batches = load_batches(
        cache, batch_size=settings.batch_size, shuffle=True, seed=config.seed, num_workers=config.num_workers
    )
    return Replay(prefix.tail, batches, cache.info)


def with_whole_update(profile: list[StepProfile], model: nn.Module) -> list[StepProfile]:
    """Counts to the adapter of a profiled tail what `model` saves of its prefix: re-estimated statistics."""
    if not isinstance(model, PeftModel):
        return profile
    # Without the argument, PEFT asks the Hub how large the base model's vocabulary is.
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    adapter_bytes = sum(tensor.nbytes for tensor in saved)
    return [row.model_copy(update={"adapter_bytes": adapter_bytes}) if row.scope == "step" else row for row in profile]


def _key(config: RunConfig, source: nn.Module, target: Domain, accelerator: Accelerator) -> str:
    """A fingerprint of everything that the stored features depend on, but for the prefix."""
    recipe = {
        # `datasets` documents this attribute, yet offers no public name for it.
        "images": target.train._fingerprint,
        "transform": data_config(config, source),
        "seed": config.seed,
        "mixed_precision": config.training.mixed_precision,
        "device": accelerator.device.type,
        "num_threads": config.num_threads,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _two_images(config: RunConfig, model: nn.Module) -> Tensor:
    size, generator = config.data.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator)
    return images.to(next(model.parameters()).device)
