"""From a Pillow image to the tensor a backbone expects, with torchvision v2 and timm's data configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
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
