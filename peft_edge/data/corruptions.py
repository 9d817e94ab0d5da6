"""Image corruptions in five families. `Shift` applies a corruption to an image, a batch or a dataset.

Most corruptions are modelled on ImageNet-C (Hendrycks and Dietterich 2019). Lengths, such as the radius of a blur, are
given in pixels for images whose shorter side is 224 pixels. For other images, lengths are scaled in proportion to the
shorter side, so that small images remain recognisable.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from peft_edge.data.domain import ImageBatch
from peft_edge.data.pixels import to_rgb
from peft_edge.files import requires_extra
from peft_edge.names import did_you_mean


@dataclass(frozen=True)
class Shift:
    """A corruption at one severity, applied to one image at a time.

    The random numbers are seeded with the pixels of the image. The corrupted image is therefore the same at every
    access and in every process.

    Args:
        name: One of `SHIFTS`.
        severity: For a corruption with severities, a number from 1 (mild) to 5 (strong); None means 5. For any other
            corruption, it must be None.

    Raises:
        ValueError: If `name` is unknown, or the corruption does not have this severity.
    """

    name: str
    severity: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _BY_NAME:
            hint = did_you_mean(self.name, SHIFTS)
            raise ValueError(f"unknown shift {self.name!r}: expected one of {', '.join(SHIFTS)}{hint}")
        levels = _BY_NAME[self.name].levels
        if self.severity is not None and not levels:
            raise ValueError(f"the shift {self.name!r} has no severities: leave severity out; found {self.severity}")
        if self.severity is not None and self.severity not in range(1, len(levels) + 1):
            raise ValueError(f"severity of the shift {self.name!r} must be 1 to {len(levels)}, found {self.severity}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the corrupted image as an RGB image of the same size."""
        corruption = _BY_NAME[self.name]
        pixels = F.pil_to_tensor(to_rgb(image))
        level = [corruption.levels[(self.severity or len(corruption.levels)) - 1]] if corruption.levels else []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(pixels.numpy().tobytes()))
            return F.to_pil_image(corruption.apply(pixels, *level))

    def shift_batch(self, batch: ImageBatch) -> ImageBatch:
        """Return a copy of the batch with corrupted images."""
        return {**batch, "image": [self(image) for image in batch["image"]]}

    def shift_dataset(self, dataset: Dataset) -> Dataset:
        """Return a view of the dataset that corrupts an image whenever the image is read."""
        return dataset.with_transform(self.shift_batch)


class Corruption(NamedTuple):
    """A function that corrupts images, and its parameter at each severity.

    `apply(image, level)` returns a corrupted copy of a (3, H, W) uint8 image. `levels` has one level for each severity.
    If a corruption has no severities, `levels` is empty, and the call is `apply(image)`.
    """

    apply: Callable[..., Tensor]
    levels: tuple[float, ...] = ()


def _as_float(image: Tensor) -> Tensor:
    return F.to_dtype(image, torch.float32, scale=True)


def _as_uint8(image: Tensor) -> Tensor:
    return F.to_dtype(image.clamp(0, 1), torch.uint8, scale=True)


def _scale(image: Tensor) -> float:
    return min(image.shape[-2:]) / 224


def _gaussian_noise(image: Tensor, deviation: float) -> Tensor:
    return _as_uint8(F.gaussian_noise(_as_float(image), sigma=deviation))


def _shot_noise(image: Tensor, photons: float) -> Tensor:
    """Replace each value v in [0, 1] by c / photons, where c is a random Poisson count of mean v * photons."""
    return _as_uint8(torch.poisson(_as_float(image) * photons) / photons)


def _impulse_noise(image: Tensor, fraction: float) -> Tensor:
    """Set a `fraction` of the channel values, chosen at random, to 0 or 255 ("salt and pepper")."""
    chance = torch.rand(image.shape)
    return image.masked_fill(chance < fraction / 2, 0).masked_fill(chance > 1 - fraction / 2, 255)


def _gaussian_blur(image: Tensor, deviation: float) -> Tensor:
    sigma = deviation * _scale(image)
    return F.gaussian_blur(image, kernel_size=2 * math.ceil(3 * sigma) + 1, sigma=sigma)


def _defocus_blur(image: Tensor, radius: float) -> Tensor:
    """Spread each point over a disc, as a lens out of focus does."""
    radius = radius * _scale(image)
    x, y = _kernel_coordinates(radius)
    return _blur(image, (radius + 0.5 - torch.hypot(x, y)).clamp(0, 1))


def _motion_blur(image: Tensor, length: float) -> Tensor:
    return _blur(image, _line_kernel(length * _scale(image)))


def _line_kernel(length: float) -> Tensor:
    """Return a kernel that blurs along a line of `length` pixels, one pixel wide, in a random direction."""
    angle = torch.rand(()) * math.pi
    x, y = _kernel_coordinates(length / 2)
    along, across = x * angle.cos() + y * angle.sin(), x * angle.sin() - y * angle.cos()
    return (1 - across.abs()).clamp(0, 1) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)


def _kernel_coordinates(reach: float) -> tuple[Tensor, Tensor]:
    side = torch.arange(-math.ceil(reach), math.ceil(reach) + 1.0)
    return side[None, :], side[:, None]


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    channels, margin = len(image), kernel.shape[-1] // 2
    padded = F.pad(_as_float(image), [margin], padding_mode="reflect")
    weight = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    return _as_uint8(torch.nn.functional.conv2d(padded, weight, groups=channels))


def _fog(image: Tensor, density: float) -> Tensor:
    """Fade to white by Koschmieder's law, `1 - (1 - image) * exp(-density * depth)`, with a smooth random `depth`."""
    height, width = image.shape[-2:]
    depth = torch.stack([_smooth_noise(height, width, 2**octave) / 2**octave for octave in range(1, 5)]).sum(0)
    return _as_uint8(1 - (1 - _as_float(image)) * torch.exp(-density * depth.clamp(min=0)))


def _snow(image: Tensor, fraction: float) -> Tensor:
    """Blend the image with light grey. Then add motion-blurred white flakes at a `fraction` of the pixels."""
    flakes = (torch.rand(1, *image.shape[-2:]) < fraction) * torch.tensor(255, dtype=torch.uint8)
    falling = _as_float(_blur(flakes, _line_kernel(12 * _scale(image)))) * 2
    return _as_uint8(torch.lerp(_as_float(image), torch.tensor(0.8), 5 * fraction) + falling)


def _smooth_noise(height: int, width: int, knots: int) -> Tensor:
    """Return a smooth random tensor (height, width).

    It is interpolated from a grid of (knots + 1) x (knots + 1) random numbers between 0 and 1.
    """
    noise = torch.rand(1, knots + 1, knots + 1)
    return F.resize(noise, [height, width], v2.InterpolationMode.BICUBIC, antialias=False)[0]


def _jpeg(image: Tensor, quality: float) -> Tensor:
    # Encode with Pillow, because torchvision is removing its JPEG functions.
    file = io.BytesIO()
    F.to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return F.pil_to_tensor(Image.open(file))


def _pixelate(image: Tensor, factor: float) -> Tensor:
    """Multiply height and width by `factor`, a number below 1. Then enlarge the image again without interpolation."""
    height, width = image.shape[-2:]
    small = F.resize(image, [math.ceil(height * factor), math.ceil(width * factor)])
    return F.resize(small, [height, width], v2.InterpolationMode.NEAREST)


def _elastic(image: Tensor, distance: float) -> Tensor:
    """Stretch the image like a rubber sheet. Neighbouring points move similarly, by about `distance` pixels."""

    def stretch(padded: Tensor) -> Tensor:
        # Do not use v2.ElasticTransform, because its blur takes two seconds for an image of 224 x 224 pixels.
        height, width = padded.shape[-2:]
        moves = torch.stack([_smooth_noise(height, width, 12) for _ in range(2)], dim=-1)
        pixels = (moves - moves.mean()) / moves.std() * distance * _scale(image)
        return F.elastic(padded, (pixels * 2 / torch.tensor([width, height]))[None])

    return _move_without_corners(image, stretch)


def _rotate(image: Tensor, degrees: float) -> Tensor:
    return _move_without_corners(image, lambda padded: F.rotate(padded, degrees, v2.InterpolationMode.BILINEAR))


def _move_without_corners(image: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Pad the image by reflection, apply `move`, and crop the result to the old size.

    Without the padding, the image would get black corners, which would be an additional corruption.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, [width // 4, height // 4], padding_mode="reflect")
    return F.center_crop(move(padded), [height, width])


def _blend(image: Tensor) -> Tensor:
    """Return the absolute difference of the image and a random crop of a photograph.

    Ganin and Lempitsky (2015) made MNIST-M in the same way.
    """
    photographs = _photographs()
    photograph = photographs[int(torch.randint(len(photographs), ()))]
    crop = v2.RandomCrop(image.shape[-2:], pad_if_needed=True, padding_mode="reflect")(photograph)
    return (crop.short() - image.short()).abs().to(torch.uint8)


@cache
def _photographs() -> list[Tensor]:
    with requires_extra("train"):
        from sklearn.datasets import load_sample_images

    return [torch.tensor(photograph).permute(2, 0, 1) for photograph in load_sample_images().images]


# The levels of the three kinds of noise are those of ImageNet-C, as are the levels of gaussian_blur, defocus_blur, jpeg
# and pixelate. The levels of contrast are those of CIFAR-10-C. All other levels are our choice.
CORRUPTIONS: dict[str, dict[str, Corruption]] = {
    "noise": {
        "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
        "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3)),
        "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    },
    "blur": {
        "gaussian_blur": Corruption(_gaussian_blur, (1, 2, 3, 4, 6)),
        "defocus_blur": Corruption(_defocus_blur, (3, 4, 6, 8, 10)),
        "motion_blur": Corruption(_motion_blur, (10, 15, 20, 30, 40)),
    },
    "weather": {
        "brightness": Corruption(F.adjust_brightness, (0.8, 0.6, 0.45, 0.3, 0.15)),
        "fog": Corruption(_fog, (0.5, 1, 1.5, 2, 3)),
        "snow": Corruption(_snow, (0.01, 0.02, 0.035, 0.05, 0.07)),
    },
    "digital": {
        "contrast": Corruption(F.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
        "jpeg": Corruption(_jpeg, (25, 18, 15, 10, 7)),
        "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
        "elastic": Corruption(_elastic, (1, 2, 3, 4, 5)),
    },
    "other": {
        "blend": Corruption(_blend),
        "grayscale": Corruption(lambda image: F.rgb_to_grayscale(image, num_output_channels=3)),
        "invert": Corruption(F.invert),
        "rotation": Corruption(_rotate, (15, 30, 45, 60, 90)),
    },
}
_BY_NAME = {name: corruption for members in CORRUPTIONS.values() for name, corruption in members.items()}

FAMILIES: dict[str, tuple[str, ...]] = {family: tuple(members) for family, members in CORRUPTIONS.items()}
"""A dict from each family to the names of its corruptions."""

SHIFTS = tuple(sorted(_BY_NAME))
"""The names of all corruptions."""
