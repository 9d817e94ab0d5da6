"""The corruptions, by family: functions from a (3, H, W) uint8 image, and how strong they are at each severity.

They are torchvision v2's where it has them, and otherwise those of ImageNet-C (Hendrycks and Dietterich, 2019) said in
tensors. Lengths are for images of 224 pixels, and shrink with the image: a small one would otherwise lose everything.

Named distribution shifts: each turns an image of the source into one of the target.
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
class Corruption:
    """A function of an image, and what it is given at the severities 1 to 5."""

    apply: Callable[..., Tensor]
    """From a (3, H, W) uint8 image, and the level if there is one, to the corrupted image."""

    levels: tuple[float, ...] = ()
    """The level at each severity; empty for what has no degrees."""


def _as_float(image: Tensor) -> Tensor:
    return F.to_dtype(image, torch.float32, scale=True)


def _as_uint8(image: Tensor) -> Tensor:
    return F.to_dtype(image.clamp(0, 1), torch.uint8, scale=True)


def _scale(image: Tensor) -> float:
    """The image's pixels for each of an image of 224."""
    return min(image.shape[-2:]) / 224


def _gaussian_noise(image: Tensor, deviation: float) -> Tensor:
    return _as_uint8(F.gaussian_noise(_as_float(image), sigma=deviation))


def _shot_noise(image: Tensor, photons: float) -> Tensor:
    """What a pixel counts in the dark: a white one sees `photons` on average."""
    return _as_uint8(torch.poisson(_as_float(image) * photons) / photons)


def _impulse_noise(image: Tensor, share: float) -> Tensor:
    """That share of the values becomes black or white ("salt and pepper")."""
    chance = torch.rand(image.shape)
    return image.masked_fill(chance < share / 2, 0).masked_fill(chance > 1 - share / 2, 255)


def _gaussian_blur(image: Tensor, deviation: float) -> Tensor:
    sigma = deviation * _scale(image)
    return F.gaussian_blur(image, kernel_size=2 * math.ceil(3 * sigma) + 1, sigma=sigma)


def _offsets(reach: float) -> tuple[Tensor, Tensor]:
    """How far the pixels around one are to the right and down, (1, N) and (N, 1)."""
    side = torch.arange(-math.ceil(reach), math.ceil(reach) + 1.0)
    return side[None, :], side[:, None]


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    channels, margin = len(image), kernel.shape[-1] // 2
    padded = F.pad(_as_float(image), [margin], padding_mode="reflect")
    weight = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    return _as_uint8(torch.nn.functional.conv2d(padded, weight, groups=channels))


def _defocus_blur(image: Tensor, radius: float) -> Tensor:
    """Each point becomes a disc, as out of a lens's focus."""
    radius = radius * _scale(image)
    right, down = _offsets(radius)
    return _blur(image, (radius + 0.5 - torch.hypot(right, down)).clamp(0, 1))


def _streak(length: float) -> Tensor:
    """A kernel that is a line, one pixel wide, in a random direction."""
    angle = torch.rand(()) * math.pi
    right, down = _offsets(length / 2)
    along, across = right * angle.cos() + down * angle.sin(), right * angle.sin() - down * angle.cos()
    return (1 - across.abs()).clamp(0, 1) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)


def _motion_blur(image: Tensor, length: float) -> Tensor:
    """Each point becomes a line, as when the camera moves."""
    return _blur(image, _streak(length * _scale(image)))


def _smooth(height: int, width: int, knots: int) -> Tensor:
    """(height, width) random numbers from 0 to 1 that change gradually, over 1 / knots of the image."""
    return F.resize(
        torch.rand(1, knots + 1, knots + 1), [height, width], v2.InterpolationMode.BICUBIC, antialias=False
    )[0]


def _fog(image: Tensor, density: float) -> Tensor:
    """Light from a haze of uneven depth (Koschmieder's law): what is seen fades exponentially into white."""
    height, width = image.shape[-2:]
    depth = torch.stack([_smooth(height, width, 2**octave) / 2**octave for octave in range(1, 5)]).sum(0)
    return _as_uint8(1 - (1 - _as_float(image)) * torch.exp(-density * depth.clamp(min=0)))


def _snow(image: Tensor, share: float) -> Tensor:
    """White flakes, drawn out as they fall, over that share of the image, in a whitened light."""
    flakes = (torch.rand(1, *image.shape[-2:]) < share) * torch.tensor(255, dtype=torch.uint8)
    falling = _as_float(_blur(flakes, _streak(12 * _scale(image)))) * 2
    return _as_uint8(torch.lerp(_as_float(image), torch.tensor(0.8), 5 * share) + falling)


def _jpeg(image: Tensor, quality: float) -> Tensor:
    # By Pillow, since torchvision is giving up its codecs.
    file = io.BytesIO()
    F.to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return F.pil_to_tensor(Image.open(file))


def _pixelate(image: Tensor, share: float) -> Tensor:
    """Keeps that share of the rows and columns of pixels."""
    height, width = image.shape[-2:]
    small = F.resize(image, [math.ceil(height * share), math.ceil(width * share)])
    return F.resize(small, [height, width], v2.InterpolationMode.NEAREST)


def _elastic(image: Tensor, distance: float) -> Tensor:
    """A rubber sheet: points are moved by about that many pixels, neighbours in similar ways."""

    def stretched(padded: Tensor) -> Tensor:
        # Not v2.ElasticTransform, which takes two seconds to smooth the noise for an image of 224 pixels.
        height, width = padded.shape[-2:]
        moves = torch.stack([_smooth(height, width, 12) for _ in range(2)], dim=-1)
        pixels = (moves - moves.mean()) / moves.std() * distance * _scale(image)
        return F.elastic(padded, (pixels * 2 / torch.tensor([width, height]))[None])

    return _without_corners(image, stretched)


def _rotate(image: Tensor, degrees: float) -> Tensor:
    return _without_corners(image, lambda padded: F.rotate(padded, degrees, v2.InterpolationMode.BILINEAR))


def _without_corners(image: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Moves pixels without the black corners, which would be a second and larger shift."""
    height, width = image.shape[-2:]
    padded = F.pad(image, [width // 4, height // 4], padding_mode="reflect")
    return F.center_crop(move(padded), [height, width])


@cache
def _photographs() -> list[Tensor]:
    return [torch.tensor(photograph).permute(2, 0, 1) for photograph in load_sample_images().images]


def _blend(image: Tensor) -> Tensor:
    """Absolute difference with a photo crop, as MNIST-M does (Ganin and Lempitsky, 2015)."""
    photographs = _photographs()
    photograph = photographs[int(torch.randint(len(photographs), ()))]
    crop = v2.RandomCrop(image.shape[-2:], pad_if_needed=True, padding_mode="reflect")(photograph)
    return (crop.short() - image.short()).abs().to(torch.uint8)


# Noise, Gaussian and defocus blur, JPEG and pixelation have the levels of ImageNet-C, contrast those of CIFAR-10-C; the
# others are ours.
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


FAMILIES: dict[str, tuple[str, ...]] = {family: tuple(members) for family, members in CORRUPTIONS.items()}
"""The names of the shifts, by family; those of noise, blur, weather and digital all come in five severities."""

_KINDS: dict[str, Corruption] = {name: kind for members in CORRUPTIONS.values() for name, kind in members.items()}
SHIFTS = tuple(sorted(_KINDS))


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
