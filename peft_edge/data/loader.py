"""Preprocess images with torchvision v2, and load batches that depend only on the dataset, the seed and the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from peft_edge.data.domain import ImageBatch
from peft_edge.data.pixels import to_rgb

Transform = Callable[[Image.Image], Tensor]  # converts an image of any size and mode to a (3, H, W) float tensor
Key = tuple[int, int]  # an epoch, and the index of an image
Batch = dict[str, Tensor]  # `pixel_values` of shape (B, 3, H, W), and `labels` of shape (B,)


class BatchDataset(Protocol):
    """A dataset whose `__getitems__` returns a whole batch."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: list[Key]) -> Batch: ...


def build_transform(data_config: Mapping[str, Any], *, train: bool) -> Transform:
    """Return a function that converts an image to the normalised input of a backbone.

    Images that are higher and wider than `input_size` are resized and cropped as in timm's evaluation. Other images are
    resized to `input_size` without a crop, because `crop_pct` is meant for photographs with a margin. This can
    change the aspect ratio. With `train`, images are also shifted horizontally and vertically, by up to an eighth of
    their width and height. Edge pixels fill the gap. This augmentation suits both digits and photographs.

    Args:
        data_config: The result of `timm.data.resolve_model_data_config`.
        train: Whether to augment the images.
    """
    mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
    return partial(_preprocess, data_config, 1 / (255 * std), -mean / std, train)


def _preprocess(
    data_config: Mapping[str, Any], scale: Tensor, offset: Tensor, train: bool, image: Image.Image
) -> Tensor:
    _, height, width = data_config["input_size"]
    crop_pct, interpolation = data_config["crop_pct"], v2.InterpolationMode(data_config["interpolation"])
    image = to_rgb(image)
    old_width, old_height = image.size
    if old_width > width and old_height > height:
        sides = ((math.floor(height / crop_pct), old_height), (math.floor(width / crop_pct), old_width))
        new, old = max(sides, key=lambda side: side[0] / side[1])
        image = F.resize(image, [old_height * new // old, old_width * new // old], interpolation)
        image = F.center_crop(image, [height, width])
    elif (old_width, old_height) != (width, height):
        image = F.resize(image, [height, width], interpolation)
    pixels = F.pil_to_tensor(image)
    if train:
        # Shift the image and repeat its edge pixels. This is four times faster than v2.RandomCrop with padding.
        down, right = ((torch.rand(2) - 0.5) / 4).tolist()
        rows = (torch.arange(height) + round(down * height)).clamp(0, height - 1)
        columns = (torch.arange(width) + round(right * width)).clamp(0, width - 1)
        pixels = pixels[:, rows[:, None], columns]
    # This replaces v2.ToDtype and v2.Normalize, whose checks take longer than reading a small image.
    return torch.addcmul(offset, pixels, scale)


def build_loader(
    dataset: Dataset, transform: Transform, *, batch_size: int, shuffle: bool, seed: int, num_workers: int = 0
) -> DataLoader[Batch]:
    """Build a loader whose batches are the same in every run with the same seed.

    With Accelerate, set `split_batches=True`, so that batches are the same for any number of processes. Before each
    epoch, and before `skip_first_batches`, call `set_epoch(epoch)` on the loader that `prepare` returned. Without
    Accelerate, call `loader.sampler.set_epoch(epoch)`.

    Args:
        dataset: A dataset with the columns `image` and `label`.
        transform: A function from a Pillow image to a (3, H, W) tensor, such as the result of `build_transform`.
        batch_size: The number of images in a batch, summed over all processes.
        shuffle: Whether to use a new order in each epoch and drop an incomplete last batch. Set this for training.
        seed: The seed of the order and of the random numbers in `transform`.
        num_workers: The number of worker processes that read images. The batches do not depend on this number.

    Raises:
        ValueError: If `shuffle` is set and there are fewer images than `batch_size`.
    """
    images = TransformedImages(dataset, transform, seed)
    return load_batches(images, batch_size=batch_size, shuffle=shuffle, seed=seed, num_workers=num_workers)


def load_batches(
    dataset: BatchDataset, *, batch_size: int, shuffle: bool, seed: int, num_workers: int = 0
) -> DataLoader[Batch]:
    """Build a loader from a `BatchDataset`. See `build_loader` for the other arguments and the errors."""
    if shuffle and len(dataset) < batch_size:
        raise ValueError(f"{len(dataset)} images do not fill one batch of {batch_size}: lower batch_size")
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # torch calls __getitems__ if it exists, but does not declare it
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle=shuffle, seed=seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_as_is,
        drop_last=shuffle,
        # Every iterator draws a seed for its workers. A draw from torch's global generator would change the random
        # numbers of a training run that resumes in the middle of an epoch.
        generator=torch.Generator(),
    )


def _as_is(batch: object) -> object:
    return batch


class EpochSampler(Sampler[Key]):
    """Yield each index once per epoch, in an order that only the seed and the epoch determine.

    Each key is (epoch, index), because worker processes seed the augmentation with the epoch. If `shuffle` is False,
    the indices are in ascending order. Accelerate's loaders pass the epoch on to `set_epoch`.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size) if self.shuffle else range(self.size)
        return ((epoch, int(index)) for index in order)


@dataclass(frozen=True)
class TransformedImages:
    """A `BatchDataset` of transformed images. `seed`, the epoch and the image's index seed each call of `transform`."""

    dataset: Dataset
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> Batch:
        indices = [index for _, index in keys]
        try:
            rows: ImageBatch = self.dataset[indices]
            images = [to_rgb(image) for image in rows["image"]]
        except Exception as error:  # Pillow raises many types of exceptions for damaged files
            raise ValueError(self._describe_unreadable(indices)) from error
        pixel_values = []
        with torch.random.fork_rng(devices=[]):
            for image, key in zip(images, keys, strict=True):
                state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0]))
                pixel_values.append(self.transform(image))
        return {"pixel_values": torch.stack(pixel_values), "labels": torch.tensor(rows["label"])}

    def _describe_unreadable(self, indices: list[int]) -> str:
        """Return a message that names the first unreadable image, because Pillow's error does not name the file."""
        for index in indices:
            try:
                to_rgb(self.dataset[index]["image"])
            except Exception as error:
                raw = self.dataset.with_format(None).cast_column("image", datasets.Image(decode=False))[index]["image"]
                return f"cannot read image {index}, {raw['path'] or 'held in memory'}: {error}; replace or remove it"
        return "an image was unreadable at first, but not at the second attempt: check the disk"
