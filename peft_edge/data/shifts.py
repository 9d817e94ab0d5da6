"""Named distribution shifts: each turns an image of the source into one of the target.

The corruptions are torchvision v2's. Where one comes in degrees, its five severities are those of ImageNet-C
(Hendrycks and Dietterich, 2019), of CIFAR-10-C for contrast, and ours for brightness and rotation.
"""

from __future__ import annotations

import difflib
import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class _Kind:
    apply: Callable[..., Tensor]
    """From a (3, H, W) uint8 image, and the level if there is one, to the shifted image."""

    levels: tuple[float, ...] = ()
    """The level at the severities 1 to 5; empty for a shift that has no degrees."""


@cache
def _photographs() -> list[Tensor]:
    return [torch.tensor(photograph).permute(2, 0, 1) for photograph in load_sample_images().images]


def _blend(image: Tensor) -> Tensor:
    """Absolute difference with a photo crop, as MNIST-M does (Ganin and Lempitsky, 2015)."""
    photographs = _photographs()
    photograph = photographs[int(torch.randint(len(photographs), ()))]
    crop = v2.RandomCrop(image.shape[-2:], pad_if_needed=True, padding_mode="reflect")(photograph)
    return (crop.short() - image.short()).abs().to(torch.uint8)


def _gaussian_blur(image: Tensor, level: float) -> Tensor:
    # ImageNet-C's widths are for 224 pixels; a small image would otherwise lose everything.
    sigma = level * min(image.shape[-2:]) / 224
    return F.gaussian_blur(image, kernel_size=2 * math.ceil(3 * sigma) + 1, sigma=sigma)


def _gaussian_noise(image: Tensor, level: float) -> Tensor:
    noisy = F.gaussian_noise(F.to_dtype(image, torch.float32, scale=True), sigma=level)
    return F.to_dtype(noisy, torch.uint8, scale=True)


def _jpeg(image: Tensor, level: float) -> Tensor:
    # By Pillow, since torchvision is giving up its codecs.
    file = io.BytesIO()
    F.to_pil_image(image).save(file, "JPEG", quality=int(level))
    return F.pil_to_tensor(Image.open(file))


def _rotate(image: Tensor, level: float) -> Tensor:
    """Rotates without the black corners, which would be a second and larger shift."""
    height, width = image.shape[-2:]
    padded = F.pad(image, [width // 4, height // 4], padding_mode="reflect")
    return F.center_crop(F.rotate(padded, level, v2.InterpolationMode.BILINEAR), [height, width])


_KINDS = {
    "blend": _Kind(_blend),
    "brightness": _Kind(F.adjust_brightness, (0.8, 0.6, 0.45, 0.3, 0.15)),
    "contrast": _Kind(F.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "gaussian_blur": _Kind(_gaussian_blur, (1, 2, 3, 4, 6)),
    "gaussian_noise": _Kind(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "grayscale": _Kind(lambda image: F.rgb_to_grayscale(image, num_output_channels=3)),
    "invert": _Kind(F.invert),
    "jpeg": _Kind(_jpeg, (25, 18, 15, 10, 7)),
    "rotation": _Kind(_rotate, (15, 30, 45, 60, 90)),
}
SHIFTS = tuple(_KINDS)


@dataclass(frozen=True)
class Shift:
    """A shift at a severity, to be applied to one image at a time.

    Whatever is random in it is drawn from the image's own content, so a shifted image is the same on every access and
    in every process.

    Args:
        name: One of `SHIFTS`.
        severity: 1 (mild) to 5, for a shift that comes in degrees; by default 5.

    Raises:
        ValueError: An unknown name, or a severity that this shift does not have.
    """

    name: str
    severity: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            nearest = difflib.get_close_matches(self.name, SHIFTS, n=1, cutoff=0)[0]
            raise ValueError(f"unknown shift {self.name!r}: did you mean {nearest!r}? There are {', '.join(SHIFTS)}")
        levels = _KINDS[self.name].levels
        if self.severity is not None and not levels:
            raise ValueError(f"the shift {self.name!r} has no degrees, so leave severity out; found {self.severity}")
        if self.severity is not None and self.severity not in range(1, len(levels) + 1):
            raise ValueError(f"severity of the shift {self.name!r} must be 1 to {len(levels)}, found {self.severity}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the shifted image, RGB and as large as the given one."""
        kind = _KINDS[self.name]
        pixels = F.pil_to_tensor(image.convert("RGB"))
        level = [kind.levels[(self.severity or len(kind.levels)) - 1]] if kind.levels else []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(pixels.numpy().tobytes()))
            return F.to_pil_image(kind.apply(pixels, *level))

    def shift_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch of a dataset with its images shifted."""
        return {**batch, "image": [self(image) for image in batch["image"]]}

    def shift_dataset(self, dataset: Dataset) -> Dataset:
        """Returns the dataset with its images shifted whenever they are read, so nothing is stored twice."""
        return dataset.with_transform(self.shift_batch)
