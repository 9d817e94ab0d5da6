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
    return Task(name="letters", change="seed", source=source, targets=(target,))


def test_the_number_of_classes(task: Task) -> None:
    assert task.num_classes == 2


def test_the_classes_of_a_task_are_those_known_in_the_end(task: Task, random_images: Callable[..., Dataset]) -> None:
    more = random_images(6, ["a", "b", "c"])
    last = Domain(train=more, validation=more, test=more)
    longer = replace(task, targets=(*task.targets, last))
    assert longer.class_names == ["a", "b", "c"]
    assert longer.num_classes == last.num_classes == 3
    assert longer.source.class_names == ["a", "b"]
    assert longer.fingerprint != task.fingerprint


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_fingerprint_of_a_domain_follows_each_split(split: str, task: Task) -> None:
    other = replace(task.source, **{split: task.targets[0].train})
    assert other.fingerprint != task.source.fingerprint
    assert replace(task, source=other).fingerprint != task.fingerprint


def test_source_and_target_are_not_interchangeable(task: Task) -> None:
    assert replace(task, source=task.targets[0], targets=(task.source,)).fingerprint != task.fingerprint
