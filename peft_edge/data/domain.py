"""Represent domains and tasks, draw stratified splits, and build in-memory datasets."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from PIL import Image as PillowImage
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from peft_edge._compat import dataset_fingerprint


class ImageBatch(TypedDict):
    """Several rows of a dataset, as a dict of columns."""

    image: list[PillowImage.Image]
    label: list[int]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Labelled images from one distribution, in three splits.

    Each split is a Hugging Face dataset with columns `image` (`datasets.Image`) and `label` (`datasets.ClassLabel`).

    Attributes:
        train: Training images. For a target domain, these are the images that the model is adapted to.
        validation: Images for selecting the learning rate. The results of a run are not measured on these images.
        test: Images for the reported accuracies. No setting is selected on the test images.
    """

    train: Dataset
    validation: Dataset
    test: Dataset

    @property
    def class_names(self) -> list[str]:
        """The class names, in the order of the labels 0, 1, ... Some classes may have no images in a split."""
        return self.train.features["label"].names

    @property
    def num_classes(self) -> int:
        """The number of class names."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """A hash of the rows and transforms of all splits. Cached models are used only for data with the same hash."""
        return _hash(*(dataset_fingerprint(split) for split in (self.train, self.validation, self.test)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem that changes after training: the images shift, or new classes arrive.

    Attributes:
        name: The `name` that was passed to `load_task`, followed by the conditions in `source_filters`, if any.
        change: A description of the change between the source and the targets.
        source: The images that the source model is trained on.
        targets: The domains to adapt to: one domain for a shift, or one domain for each increment of new classes.
    """

    name: str
    change: str
    source: Domain
    targets: tuple[Domain, ...]

    @property
    def class_names(self) -> list[str]:
        """The class names of the last target: first the classes of the source, then any new classes."""
        return self.targets[-1].class_names

    @property
    def num_classes(self) -> int:
        """The number of classes of the last target."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """A hash of the fingerprints of all domains."""
        return _hash(self.source.fingerprint, *(target.fingerprint for target in self.targets))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def stratified_split(dataset: Dataset, size: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """Draw `size` random images with the class proportions of the dataset. Return (remaining images, drawn images).

    Both parts contain at least one image of each class.

    Raises:
        ValueError: If a class has a single image, or one of the two parts would have fewer images than classes.
    """
    names = dataset.features["label"].names
    counts = Counter(dataset["label"][:])
    label, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"class {names[label]!r} has a single image left, so no validation, test or adaptation images can be split "
            "off: add images to that class, or provide a dataset that has these splits"
        )
    if not len(counts) <= size <= len(dataset) - len(counts):
        raise ValueError(
            f"cannot take {size} of {len(dataset)} images so that both parts have all {len(counts)} classes: "
            "add images, or choose another number"
        )
    parts = dataset.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return _with_all_classes(parts["train"], parts["test"])


def _with_all_classes(rest: Dataset, drawn: Dataset) -> tuple[Dataset, Dataset]:
    """Exchange images between the two parts, so that each part has every class. Keep the sizes of the parts.

    This is necessary if a stratified split has rounded the share of a small class to zero images.
    """
    if {*rest["label"][:]} == {*drawn["label"][:]}:
        return rest, drawn
    whole = concatenate_datasets([rest, drawn])
    labels, is_drawn = np.array(whole["label"][:]), np.arange(len(whole)) >= len(rest)
    for part in (True, False):
        for label in np.unique(labels):
            if not (is_drawn[labels == label] == part).any():
                largest = np.bincount(labels[is_drawn == part]).argmax()
                given = np.flatnonzero((labels == largest) & (is_drawn == part))[-1]
                is_drawn[np.flatnonzero(labels == label)[-1]], is_drawn[given] = part, not part
    return whole.select(np.flatnonzero(~is_drawn)), whole.select(np.flatnonzero(is_drawn))


def dataset_from_arrays(images: Tensor, labels: Tensor, class_names: list[str]) -> Dataset:
    """Build an in-memory dataset from uint8 images of shape (N, H, W, 3) and class indices of shape (N,).

    The images are encoded as uncompressed PPM files, which Pillow decodes several times faster than PNG files.
    """
    _, height, width, _ = images.shape
    header = f"P6 {width} {height} 255\n".encode()
    encoded = pa.array([header + image.tobytes() for image in images.numpy()], pa.binary())
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    table = pa.table({"image": features["image"].cast_storage(encoded), "label": pa.array(labels.numpy())})
    return Dataset(table.cast(features.arrow_schema))


def read_into_memory(dataset: Dataset) -> Dataset:
    """Read all images of a dataset through its transform, and return them as an in-memory dataset.

    All images must be RGB and have the same size.
    """
    rows = dataset[:]
    images = torch.stack([F.pil_to_tensor(image) for image in rows["image"]]).permute(0, 2, 3, 1)
    return dataset_from_arrays(images.contiguous(), torch.tensor(rows["label"]), dataset.features["label"].names)
