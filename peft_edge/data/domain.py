"""What a run adapts to: a source domain, one or more target domains, and what changed between them.

Stratified splitting, by seed.

Images held as arrays, as the Hugging Face datasets that users of `datasets` expect.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def combined_fingerprint(*parts: str) -> str:
    """Returns 16 hexadecimal digits that change when any part, or the order of the parts, changes."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Three splits of labelled images from one distribution.

    Each split is a Hugging Face dataset with the columns `image` (`datasets.Image`) and `label`
    (`datasets.ClassLabel`).
    """

    train: Dataset
    """Images a model is trained on; for a target domain, the few it is adapted with."""

    validation: Dataset
    """Images that choose a learning rate or an epoch, never reported."""

    test: Dataset
    """Images that are only reported."""

    @property
    def class_names(self) -> list[str]:
        """The names of the labels 0, 1, ...; a split need not hold images of all of them."""
        return self.train.features["label"].names

    @property
    def num_classes(self) -> int:
        """The number of classes that a model for this domain tells apart."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Changes when an image, a label, a split or the shift of this domain changes; a key for caching a model."""
        # `datasets` documents this attribute, yet offers no public name for it.
        return combined_fingerprint(*(split._fingerprint for split in (self.train, self.validation, self.test)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem that changes between training and use: its images shift, or classes are added."""

    name: str
    """What was asked of `load_task`: a benchmark, a Hugging Face dataset or a folder."""

    change: str
    """What makes the targets differ from the source, in words."""

    source: Domain
    """Where the model comes from."""

    targets: tuple[Domain, ...]
    """Where it must work: one domain for a shift, one for each increment of new classes, in their order."""

    @property
    def class_names(self) -> list[str]:
        """The names of the labels 0, 1, ... in the end; those of the source, and then the new ones."""
        return self.targets[-1].class_names

    @property
    def num_classes(self) -> int:
        """The number of classes in the end."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Changes when any domain does."""
        return combined_fingerprint(self.source.fingerprint, *(target.fingerprint for target in self.targets))


def stratified_split(dataset: Dataset, size: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """Splits off `size` images in which every class has its share.

    Args:
        dataset: A dataset with a `label` column.
        size: How many images to split off.
        seed: Which images those are.

    Returns:
        The remaining images and those split off.

    Raises:
        ValueError: There are too few images for every class to be on both sides.
    """
    names = dataset.features["label"].names
    counts = Counter(dataset["label"][:])
    label, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"class {names[label]!r} has a single image left, so no validation, test or adaptation images can be split "
            "off it: add images to that class, or give the data set its own splits"
        )
    if not len(counts) <= size <= len(dataset) - len(counts):
        raise ValueError(
            f"cannot split {size} images off {len(dataset)} with all {len(counts)} classes on both sides: "
            "add images, or ask for another number"
        )
    parts = dataset.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return parts["train"], parts["test"]


def dataset_from_arrays(images: Tensor, labels: Tensor, class_names: list[str]) -> Dataset:
    """Returns images and labels as a dataset that lives in memory.

    The images are kept as uncompressed PPM files: Pillow reads one in about 30 µs, several times faster than a PNG.

    Args:
        images: (N, H, W, 3), uint8.
        labels: (N,), the index of each image's class.
        class_names: The names of the classes.

    Returns:
        A dataset with the columns `image` and `label`.
    """
    _, height, width, _ = images.shape
    header = f"P6 {width} {height} 255\n".encode()
    encoded = pa.array([header + image.tobytes() for image in images.numpy()], pa.binary())
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    table = pa.table({"image": features["image"].cast_storage(encoded), "label": pa.array(labels.numpy())})
    return Dataset(table.cast(features.arrow_schema))


def read_into_memory(dataset: Dataset) -> Dataset:
    """Returns the same images and labels held as arrays, what a transform makes of them included.

    Args:
        dataset: RGB images of one size.
    """
    rows = dataset[:]
    images = torch.stack([F.pil_to_tensor(image) for image in rows["image"]]).permute(0, 2, 3, 1)
    return dataset_from_arrays(images.contiguous(), torch.tensor(rows["label"]), dataset.features["label"].names)
