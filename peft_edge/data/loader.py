"""From a Pillow image to the tensor a backbone expects, with torchvision v2 and timm's data configuration.

Batches of tensors from a dataset, in an order and with augmentations that only the seed, epoch and image decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


def build_transform(data_config: Mapping[str, Any], *, train: bool) -> Callable[[Image.Image], Tensor]:
    """Builds the preprocessing that belongs to a backbone.

    An image is resized and cropped as timm evaluates; one that is no larger than the input is stretched to it whole,
    since `crop_pct` supposes a photograph with a margin. For training it is then moved by up to an eighth of the side,
    the one augmentation that fits digits as well as photographs.

    Args:
        data_config: From `timm.data.resolve_model_data_config`: `input_size`, `interpolation`, `crop_pct`, `mean` and
            `std`.
        train: Whether to augment.

    Returns:
        A function from a Pillow image of any size and mode to a (3, H, W) float tensor.
    """
    return _Transform(data_config, train=train)


class _Transform:
    def __init__(self, data_config: Mapping[str, Any], *, train: bool) -> None:
        _, self.height, self.width = data_config["input_size"]
        self.interpolation = v2.InterpolationMode(data_config["interpolation"])
        self.crop_pct = data_config["crop_pct"]
        mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
        self.scale, self.offset = 1 / (255 * std), -mean / std
        self.train = train

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = F.pil_to_tensor(self._resized(image.convert("RGB")))
        if self.train:
            pixels = self._moved(pixels)
        # What v2.ToDtype and v2.Normalize do, in one operation: their checks cost more than reading a small image.
        return torch.addcmul(self.offset, pixels, self.scale)

    def _moved(self, pixels: Tensor) -> Tensor:
        """Moves the image, and repeats its edge; four times faster than v2.RandomCrop with padding."""
        down, right = ((torch.rand(2) - 0.5) / 4).tolist()
        rows = (torch.arange(self.height) + round(down * self.height)).clamp(0, self.height - 1)
        columns = (torch.arange(self.width) + round(right * self.width)).clamp(0, self.width - 1)
        return pixels[:, rows[:, None], columns]

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if (width, height) == (self.width, self.height):
            return image
        if width <= self.width or height <= self.height:
            return F.resize(image, [self.height, self.width], self.interpolation)
        sides = ((math.floor(self.height / self.crop_pct), height), (math.floor(self.width / self.crop_pct), width))
        new, old = max(sides, key=lambda side: side[0] / side[1])
        size = [height * new // old, width * new // old]
        return F.center_crop(F.resize(image, size, self.interpolation), [self.height, self.width])


Key = tuple[int, int]
"""An epoch, and the index of an image."""


class EpochSampler(Sampler[Key]):
    """Visits every image once, in an order that follows from the seed and the epoch.

    The epoch travels with each index, so that an image's augmentation needs no state in a worker process. Accelerate's
    loaders call `set_epoch`; without Accelerate, call `loader.sampler.set_epoch(epoch)` before each epoch.

    Args:
        size: The number of images.
        shuffle: Whether the order is random.
        seed: Together with the epoch, the source of the order.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size) if self.shuffle else range(self.size)
        return ((epoch, int(index)) for index in order)


class TransformedImages(TorchDataset[dict[str, Tensor]]):
    """A dataset that yields whole batches: `pixel_values` (B, 3, H, W) and `labels` (B,).

    Args:
        dataset: A dataset with the columns `image` and `label`.
        transform: From a Pillow image to a (3, H, W) tensor.
        seed: With the epoch and the index, the source of the random choices in `transform`.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any], Tensor], *, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        rows = self._read([index for _, index in keys])
        with torch.random.fork_rng(devices=[]):
            pixel_values = [self._transformed(image, key) for image, key in zip(rows["image"], keys, strict=True)]
        return {"pixel_values": torch.stack(pixel_values), "labels": torch.tensor(rows["label"])}

    def _transformed(self, image: Any, key: Key) -> Tensor:
        state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(state[0]))
        return self.transform(image)

    def _read(self, indices: list[int]) -> dict[str, Any]:
        try:
            return self.dataset[indices]
        except (OSError, SyntaxError) as error:
            raise ValueError(self._unreadable(indices)) from error

    def _unreadable(self, indices: list[int]) -> str:
        """Pillow's error does not say which file of the batch it could not read."""
        for index in indices:
            try:
                self.dataset[index]
            except (OSError, SyntaxError) as error:
                raw = self.dataset.with_format(None).cast_column("image", datasets.Image(decode=False))[index]["image"]
                return f"cannot read image {index}, {raw['path'] or 'held in memory'}: {error}; replace or remove it"
        return "an image could not be read, but could on a second try: check the disk"


def _as_is(batch: Any) -> Any:
    return batch


def build_loader(
    dataset: Dataset,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    num_workers: int = 0,
) -> DataLoader:
    """Builds a loader whose batches are the same in every run with the same seed.

    With Accelerate, pass it through `prepare` with `split_batches=True`, so that a batch is the same whatever the
    number of processes, and call `loader.set_epoch(epoch)` before each epoch, also before `skip_first_batches`.

    Args:
        dataset: A dataset with the columns `image` and `label`.
        transform: From a Pillow image to a (3, H, W) tensor, for example from `build_transform`.
        batch_size: The number of images in a batch, over all processes.
        shuffle: For training: another order in each epoch, and an incomplete last batch is left out.
        seed: The source of the order and of the random choices in `transform`.
        num_workers: The number of processes that read images; 0 reads them in this one. It changes no batch.

    Returns:
        A loader of `{"pixel_values": (B, 3, H, W) float, "labels": (B,) int64}`.

    Raises:
        ValueError: There are fewer images than one training batch.
    """
    images = TransformedImages(dataset, transform, seed=seed)
    return load_batches(images, batch_size=batch_size, shuffle=shuffle, seed=seed, num_workers=num_workers)


def load_batches(dataset: Any, *, batch_size: int, shuffle: bool, seed: int, num_workers: int = 0) -> DataLoader:
    """`build_loader` for what yields whole batches itself: a torch dataset with `__getitems__` for a list of `Key`.

    Raises:
        ValueError: There are fewer images than one training batch.
    """
    if shuffle and len(dataset) < batch_size:
        raise ValueError(f"{len(dataset)} images do not fill one batch of {batch_size}: lower batch_size")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle=shuffle, seed=seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_as_is,
        drop_last=shuffle,
        # Every iterator draws a seed for its workers. Drawn from the random numbers of training, it would change those
        # of a run that is resumed in the middle of an epoch.
        generator=torch.Generator(),
    )
