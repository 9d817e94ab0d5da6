"""Stratified splitting, by seed."""

from __future__ import annotations

from collections import Counter

from datasets import Dataset


def carve(dataset: Dataset, size: int, *, seed: int) -> tuple[Dataset, Dataset]:
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
