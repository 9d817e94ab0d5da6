from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from datasets import Dataset

from peft_edge.data.splits import carve


def test_every_class_has_its_share_and_no_image_is_in_both(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(90, ["a", "b", "c"])
    rest, part = carve(whole, 30, seed=0)
    assert Counter(part["label"]) == {0: 10, 1: 10, 2: 10}
    images = [np.asarray(image).tobytes() for split in (rest, part) for image in split["image"]]
    assert sorted(images) == sorted(np.asarray(image).tobytes() for image in whole["image"])


def test_the_seed_chooses_the_images(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(60, ["a", "b"])
    first, again, other = (
        [np.asarray(image).tobytes() for image in carve(whole, 20, seed=seed)[1]["image"]] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_class_with_a_single_image_is_named(random_images: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match="class 'c' has a single image"):
        carve(random_images(5, ["a", "b", "c"]), 3, seed=0)


def test_classes_without_images_take_no_part(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(60, list("abcdef")).filter(lambda label: label < 2, input_columns="label")
    assert Counter(carve(whole, 2, seed=0)[1]["label"]) == {0: 1, 1: 1}


@pytest.mark.parametrize("size", [2, 10])
def test_too_few_images_for_every_class_on_both_sides(size: int, random_images: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match=f"cannot split {size} images off 12 with all 3 classes"):
        carve(random_images(12, ["a", "b", "c"]), size, seed=0)
