"""Named distribution shifts: each turns an image of the source into one of the target."""

from __future__ import annotations

import difflib
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torchvision.transforms.v2 import functional as F

from peft_edge.data.corruptions import CORRUPTIONS, Corruption

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
