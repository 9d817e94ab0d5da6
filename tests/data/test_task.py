from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from datasets import Dataset

from peft_edge.data import Domain, Task


@pytest.fixture
def task(random_images: Callable[..., Dataset]) -> Task:
    parts = [random_images(4, ["a", "b"], seed=seed) for seed in range(6)]
    source, target = (Domain(train=train, validation=valid, test=test) for train, valid, test in (parts[:3], parts[3:]))
    return Task(name="letters", shift="seed", class_names=["a", "b"], source=source, target=target)


def test_the_number_of_classes(task: Task) -> None:
    assert task.num_classes == 2


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_fingerprint_of_a_domain_follows_each_split(split: str, task: Task) -> None:
    other = replace(task.source, **{split: task.target.train})
    assert other.fingerprint != task.source.fingerprint
    assert replace(task, source=other).fingerprint != task.fingerprint


def test_source_and_target_are_not_interchangeable(task: Task) -> None:
    assert replace(task, source=task.target, target=task.source).fingerprint != task.fingerprint
