from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from peft_edge.data import load_task
from peft_edge.data.digits import load_digits_domain


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    source, adaptation = load_digits_domain(image_size=48, seed=0)
    return {**vars(source), "adaptation": adaptation}


def pixels(split: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in split["image"]])


def test_the_splits_are_stratified_and_have_the_documented_sizes(splits: dict[str, Dataset]) -> None:
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 700, "adaptation": 400, "validation": 150, "test": 547
    }  # fmt: skip
    for split in splits.values():
        counts = Counter(split["label"])
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 0.05 * len(split)


def test_every_digit_is_in_exactly_one_split_as_pillow_enlarges_it(splits: dict[str, Dataset]) -> None:
    images = np.concatenate([pixels(split)[..., 0] for split in splits.values()]).reshape(1797, -1).astype(np.float32)
    labels = np.concatenate([split["label"] for split in splits.values()])
    digits = load_digits()
    grey = (Image.fromarray((digit * 255 / 16).astype(np.float32)) for digit in digits.images)
    expected = np.stack([np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in grey])
    expected = expected.clip(0, 255).reshape(1797, -1)
    nearest = ((expected**2).sum(1)[:, None] - 2 * expected @ images.T + (images**2).sum(1)).argmin(axis=1)
    assert sorted(nearest) == list(range(1797))
    assert (labels[nearest] == digits.target).all()
    assert np.abs(images[nearest] - expected).max() <= 1


def test_the_images_are_grey_and_of_the_asked_size() -> None:
    source, _ = load_digits_domain(image_size=20, seed=0)
    image = np.asarray(source.test[0]["image"])
    assert image.shape == (20, 20, 3)
    assert (image == image[..., :1]).all()


def test_the_seed_chooses_the_splits(splits: dict[str, Dataset]) -> None:
    again, _ = load_digits_domain(image_size=48, seed=0)
    other, _ = load_digits_domain(image_size=48, seed=1)
    assert np.array_equal(pixels(again.test), pixels(splits["test"]))
    assert not np.array_equal(pixels(other.test), pixels(splits["test"]))


def test_source_and_target_share_their_test_digits() -> None:
    task = load_task("digits", shift="invert")
    assert task.source.test["label"] == task.targets[0].test["label"]
    assert np.array_equal(pixels(task.targets[0].test), 255 - pixels(task.source.test))
