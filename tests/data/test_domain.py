"""Domains, tasks, stratified splits and in-memory datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import ImageOps

from peft_edge._compat import dataset_fingerprint
from peft_edge.data import Domain, Task
from peft_edge.data.domain import dataset_from_arrays, read_into_memory, stratified_split


@pytest.fixture
def task(random_images: Callable[..., Dataset]) -> Task:
    parts = [random_images(4, ["a", "b"], seed=seed) for seed in range(6)]
    source, target = (Domain(train=train, validation=valid, test=test) for train, valid, test in (parts[:3], parts[3:]))
    return Task(name="letters", change="seed", source=source, targets=(target,))


def test_num_classes_of_a_task(task: Task) -> None:
    assert task.num_classes == 2


def test_classes_of_a_task_are_those_of_its_last_target(task: Task, random_images: Callable[..., Dataset]) -> None:
    more = random_images(6, ["a", "b", "c"])
    last = Domain(train=more, validation=more, test=more)
    longer = replace(task, targets=(*task.targets, last))
    assert longer.class_names == ["a", "b", "c"]
    assert longer.num_classes == last.num_classes == 3
    assert longer.source.class_names == ["a", "b"]
    assert longer.fingerprint != task.fingerprint


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_domain_fingerprint_depends_on_each_split(split: str, task: Task) -> None:
    other = replace(task.source, **{split: task.targets[0].train})
    assert other.fingerprint != task.source.fingerprint
    assert replace(task, source=other).fingerprint != task.fingerprint


def test_task_fingerprint_depends_on_the_order_of_domains(task: Task) -> None:
    assert replace(task, source=task.targets[0], targets=(task.source,)).fingerprint != task.fingerprint


def test_split_keeps_class_proportions_and_loses_no_image(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(90, ["a", "b", "c"])
    rest, part = stratified_split(whole, 30, seed=0)
    assert Counter(part["label"]) == {0: 10, 1: 10, 2: 10}
    images = [np.asarray(image).tobytes() for split in (rest, part) for image in split["image"]]
    assert sorted(images) == sorted(np.asarray(image).tobytes() for image in whole["image"])


def test_split_depends_on_the_seed(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(60, ["a", "b"])
    first, again, other = (
        [np.asarray(image).tobytes() for image in stratified_split(whole, 20, seed=seed)[1]["image"]]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_split_names_a_class_with_a_single_image(random_images: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match="class 'c' has a single image"):
        stratified_split(random_images(5, ["a", "b", "c"]), 3, seed=0)


def test_split_ignores_classes_without_images(random_images: Callable[..., Dataset]) -> None:
    whole = random_images(60, list("abcdef")).filter(lambda label: label < 2, input_columns="label")
    assert Counter(stratified_split(whole, 2, seed=0)[1]["label"]) == {0: 1, 1: 1}


PROPORTIONS = {"small class in part": ({"a": 60, "b": 3, "c": 37}, 10), "nearly all drawn": ({"a": 40, "b": 2}, 40)}


@pytest.mark.parametrize("case", PROPORTIONS)
def test_split_has_a_small_class_in_both_parts(case: str, random_images: Callable[..., Dataset]) -> None:
    counts, size = PROPORTIONS[case]
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    images = random_images(len(labels), list(counts))
    whole = images.remove_columns("label").add_column("label", labels, feature=images.features["label"])
    rest, part = stratified_split(whole, size, seed=0)
    assert set(rest["label"]) == set(part["label"]) == set(labels)
    assert len(part) == size
    found = [np.asarray(image).tobytes() for split in (rest, part) for image in split["image"]]
    assert sorted(found) == sorted(np.asarray(image).tobytes() for image in whole["image"])


@pytest.mark.parametrize("size", [2, 10])
def test_split_refuses_too_few_images_for_both_sides(size: int, random_images: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match=f"cannot take {size} of 12 images so that both parts have all 3 classes"):
        stratified_split(random_images(12, ["a", "b", "c"]), size, seed=0)


def test_dataset_from_arrays_returns_the_same_images_and_labels() -> None:
    images = torch.randint(256, (5, 6, 9, 3), dtype=torch.uint8)
    dataset = dataset_from_arrays(images, torch.tensor([1, 0, 1, 1, 0]), ["no", "yes"])
    assert dataset.features == Features({"image": Image(), "label": ClassLabel(names=["no", "yes"])})
    assert dataset["label"][:] == [1, 0, 1, 1, 0]
    assert all(image.mode == "RGB" for image in dataset["image"])
    assert np.array_equal(np.stack([np.asarray(image) for image in dataset["image"]]), images.numpy())


def test_dataset_fingerprint_depends_on_the_pixels() -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    changed = images.clone()
    changed[1, 2, 3, 0] = 1
    first, again, other = (dataset_from_arrays(part, torch.arange(2), ["a", "b"]) for part in (images, images, changed))
    assert dataset_fingerprint(first) == dataset_fingerprint(again) != dataset_fingerprint(other)


def test_read_into_memory_applies_the_transform_once() -> None:
    images, labels = torch.randint(256, (4, 5, 6, 3), dtype=torch.uint8), torch.tensor([1, 0, 1, 1])
    reads = []

    def inverted(batch: dict) -> dict:
        reads.extend(batch["image"])
        return {**batch, "image": [ImageOps.invert(image) for image in batch["image"]]}

    held = read_into_memory(dataset_from_arrays(images, labels, ["a", "b"]).with_transform(inverted))
    for _ in range(2):
        assert np.array_equal([np.asarray(image) for image in held["image"]], 255 - images.numpy())
    assert len(reads) == 4
    assert held["label"][:] == labels.tolist()
    assert held.features["label"].names == ["a", "b"]
