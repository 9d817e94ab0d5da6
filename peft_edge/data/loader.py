"""Preprocess images with torchvision v2, and load batches that depend only on the dataset, the seed and the epoch."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol, get_args

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from peft_edge.data.pixels import open_image, read_rgb, to_rgb, upright_size

Transform = Callable[[Image.Image], Tensor]  # converts an image of any size and mode to a (3, H, W) float tensor
Augmentation = Literal["none", "shift", "photo"]
Key = tuple[int, int]  # an epoch, and the index of an image
Batch = dict[str, Tensor]  # `pixel_values` of shape (B, 3, H, W), and `labels` of shape (B,)


class BatchDataset(Protocol):
    """A dataset whose `__getitems__` returns a whole batch."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: list[Key]) -> Batch: ...


def build_transform(data_config: Mapping[str, Any], *, train: bool, augment: Augmentation = "shift") -> Transform:
    """Return a function that converts an image to the normalised input of a backbone.

    An image that is both higher and wider than `input_size` in `data_config` is resized, and its centre is cropped, as
    in timm's transform for evaluation. If `crop_mode` in `data_config` is `"squash"`, this resizing ignores the aspect
    ratio. An image that is not both higher and wider is resized to `input_size` without a crop, and its aspect ratio
    may change. Such small images usually have no margin to crop. With the augmentation `"photo"`, a random crop of
    every image is resized instead. A JPEG whose sides are at least four times as long as needed is decoded at a reduced
    size.

    Args:
        data_config: The result of `timm.data.resolve_model_data_config`.
        train: Whether to augment the images.
        augment: The augmentation; only used if `train` is true. `"shift"` moves the image horizontally and vertically,
            by up to an eighth of its width and height, and repeats its edge pixels. It suits digits, text and small
            images. `"photo"` takes a random crop of 70 to 100 % of the area, flips half of the images, and changes
            brightness, contrast and saturation by up to 30 %. This is the augmentation of Gulrajani and Lopez-Paz
            (2021, arXiv 2007.01434) for PACS, except that they also change the hue and make some images grey. Those two
            changes are left out, because they would take more time than all others together. `"none"` changes nothing.

    Raises:
        ValueError: If `augment` is unknown.
    """
    if augment not in get_args(Augmentation):
        raise ValueError(f"augment is {augment!r}, expected one of {', '.join(get_args(Augmentation))}")
    mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
    return partial(_preprocess, data_config, 1 / (255 * std), -mean / std, augment if train else "none")


def _preprocess(
    data_config: Mapping[str, Any], scale: Tensor, offset: Tensor, augment: Augmentation, image: Image.Image
) -> Tensor:
    _, height, width = data_config["input_size"]
    interpolation = v2.InterpolationMode(data_config["interpolation"])
    if augment == "photo":
        pixels = _random_view(image, (height, width), interpolation)
    else:
        is_squashed = data_config.get("crop_mode") == "squash"
        view = _centre_view(image, (height, width), interpolation, data_config["crop_pct"], is_squashed)
        pixels = F.pil_to_tensor(view)
    if augment == "shift":
        pixels = _shifted(pixels)
    # This line replaces v2.ToDtype and v2.Normalize, whose checks take longer than reading a small image.
    return torch.addcmul(offset, pixels, scale)


def _centre_view(
    image: Image.Image, size: tuple[int, int], interpolation: v2.InterpolationMode, crop_pct: float, is_squashed: bool
) -> Image.Image:
    """Return the image as RGB with `size` (height, width).

    An image that is both higher and wider than `size` is resized until it just covers `size / crop_pct`. Then its
    centre is cropped to `size`, as in timm's transform for evaluation. If `is_squashed`, the image is resized to
    exactly `size / crop_pct` before the crop, and loses its aspect ratio. An image that is not both higher and wider
    than `size` is resized to `size` without a crop.
    """
    height, width = size
    old_width, old_height = upright_size(image)
    if old_width > width and old_height > height:
        sides = ((math.floor(height / crop_pct), old_height), (math.floor(width / crop_pct), old_width))
        new, old = max(sides, key=lambda side: side[0] / side[1])
        covering = [sides[0][0], sides[1][0]] if is_squashed else [old_height * new // old, old_width * new // old]
        image = read_rgb(image, shrink=old / new)
        image = F.resize(image, covering, interpolation)
        return F.center_crop(image, [height, width])
    image = read_rgb(image)
    return image if image.size == (width, height) else F.resize(image, [height, width], interpolation)


def _random_view(image: Image.Image, size: tuple[int, int], interpolation: v2.InterpolationMode) -> Tensor:
    """Resize a random crop to `size` (height, width), and flip it and change its colours at random.

    The result is a uint8 tensor (3, height, width).
    """
    width, height = upright_size(image)
    # Choose the crop before the image is decoded, so that a large JPEG can be decoded at a reduced size.
    blank = torch.empty(3, height, width, device="meta")
    top, left, crop_height, crop_width = RandomResizedCrop.get_params(blank, [0.7, 1.0], [3 / 4, 4 / 3])
    image = read_rgb(image, shrink=min(crop_height / size[0], crop_width / size[1]))
    down, right = image.height / height, image.width / width
    box = [round(top * down), round(left * right), round(crop_height * down), round(crop_width * right)]
    # A torch tensor with the channels last is resized four times as fast as a Pillow image.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = F.resized_crop(pixels, *box, list(size), interpolation, antialias=True)
    return _COLOURS_AND_SIDES(pixels)


_COLOURS_AND_SIDES = v2.Compose(
    [v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)]
)


def _shifted(pixels: Tensor) -> Tensor:
    """Shift an image (3, H, W) by random distances, up to an eighth of its height and width.

    The edge pixels are repeated to fill the gaps.
    """
    sizes = pixels.shape[1:]
    for dim, (part, size) in enumerate(zip(((torch.rand(2) - 0.5) / 4).tolist(), sizes, strict=True), start=1):
        # `roll` moves the pixels of one side to the opposite side. Overwrite them there with copies of the edge.
        # Indexing with clamped positions has the same result, but takes ten times as long.
        if step := round(part * size):
            pixels = pixels.roll(-step, dim)
            edge, filled = (size - 1 - step, slice(size - step, size)) if step > 0 else (-step, slice(0, -step))
            pixels.movedim(dim, 0)[filled] = pixels.movedim(dim, 0)[edge].clone()
    return pixels


def typical_size(dataset: Dataset) -> tuple[int, int]:
    """Return (median width, median height) in pixels, estimated from at most 63 images at evenly spaced indices."""
    rows = list(range(0, len(dataset), max(1, len(dataset) // 32)))
    sizes = [upright_size(open_image(value)) for value in _undecoded(dataset)[rows]["image"]]
    widths, heights = zip(*sizes, strict=True)
    return round(statistics.median(widths)), round(statistics.median(heights))


def has_larger_image(dataset: Dataset, size: int) -> bool:
    """Return whether any image is both higher and wider than `size` pixels. `build_transform` may crop such images."""
    return any(min(upright_size(open_image(row["image"]))) > size for row in _undecoded(dataset))


def _undecoded(dataset: Dataset) -> Dataset:
    """Return the dataset without its transform, and with files instead of images in the column `image`.

    Each value in this column is a dict with the keys `path` and `bytes`.
    """
    return dataset.with_format(None).cast_column("image", datasets.Image(decode=False))


def build_loader(
    dataset: Dataset, transform: Transform, *, batch_size: int, shuffle: bool, seed: int, num_workers: int = 0
) -> DataLoader[Batch]:
    """Build a loader whose batches are the same in every run with the same seed.

    With Accelerate, set `split_batches=True` in the `DataLoaderConfiguration`, so that batches are the same for any
    number of processes. Before each epoch, call `set_epoch(epoch)` on the loader that Accelerate's `prepare` returned.
    If you call Accelerate's `skip_first_batches`, call `set_epoch` before it. Without Accelerate, call
    `loader.sampler.set_epoch(epoch)` before each epoch.

    Args:
        dataset: A dataset with the columns `image` and `label`.
        transform: A function from a Pillow image to a (3, H, W) tensor, such as the result of `build_transform`.
        batch_size: The number of images in a batch, summed over all processes.
        shuffle: Whether to use a new order in each epoch and drop an incomplete last batch. Set this for training.
        seed: The seed of the order and of the random numbers in `transform`.
        num_workers: The number of worker processes that read images. The batches do not depend on this number.

    Raises:
        ValueError: If `shuffle` is True and there are fewer images than `batch_size`.
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
        worker_init_fn=_leave_process_group,
        collate_fn=_as_is,
        drop_last=shuffle,
        # Each new iterator of the loader draws a seed for its workers from `generator`. By default, it would draw from
        # torch's global generator. A run that resumes in the middle of an epoch creates one more iterator. With the
        # global generator, its later random numbers would therefore differ from those of an uninterrupted run.
        generator=torch.Generator(),
    )


def _leave_process_group(worker: int) -> None:
    """Move this worker process to a new process group.

    `timeout` and many schedulers send SIGTERM to the whole process group of the training process. The training process
    then finishes its step and writes a checkpoint. It needs its workers for this, so the signal must not end them.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def _as_is(batch: object) -> object:
    return batch


class EpochSampler(Sampler[Key]):
    """Yield a key (epoch, index) for each index of a dataset, in an order that only the seed and the epoch determine.

    The key contains the epoch because worker processes seed the augmentation with it. If `shuffle` is False, the
    indices are in ascending order. The method `set_epoch` of Accelerate's loaders calls `set_epoch` of this sampler.
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
    """A `BatchDataset` of transformed images.

    Each call of `transform` is seeded with `seed`, the epoch and the index of the image.
    """

    dataset: Dataset
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> Batch:
        indices = [index for _, index in keys]
        try:
            rows = self._rows[indices]
            # `open_image` opens a JPEG file but does not decode it. `transform` decodes the file at the required size.
            images = [open_image(value) if isinstance(value, dict) else value for value in rows["image"]]
            pixel_values = self._transformed(images, keys)
        except Exception as error:  # Pillow raises many types of exceptions for damaged files
            if message := self._describe_unreadable(indices):
                raise ValueError(message) from error
            raise
        return {"pixel_values": torch.stack(pixel_values), "labels": torch.tensor(rows["label"])}

    @cached_property
    def _rows(self) -> Dataset:
        has_transform = self.dataset.format["type"] == "custom"
        return self.dataset if has_transform else _undecoded(self.dataset)

    def _transformed(self, images: list[Image.Image], keys: list[Key]) -> list[Tensor]:
        pixel_values = []
        with torch.random.fork_rng(devices=[]):
            for image, key in zip(images, keys, strict=True):
                state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0]))
                pixel_values.append(self.transform(image))
        return pixel_values

    def _describe_unreadable(self, indices: list[int]) -> str | None:
        """Return a message that names the first unreadable image, or None if all images are readable.

        Pillow's own error does not name the file.
        """
        for index in indices:
            try:
                to_rgb(self.dataset[index]["image"])
            except Exception as error:
                raw = _undecoded(self.dataset)[index]["image"]
                return f"cannot read image {index}, {raw['path'] or 'held in memory'}: {error}; replace or remove it"
        return None
