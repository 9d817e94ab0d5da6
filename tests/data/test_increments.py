from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from datasets import Dataset, are_progress_bars_disabled

from peft_edge.data import Domain, Task, load_task
from peft_edge.data.increments import class_increments

NAMES = ["a", "b", "c", "d", "e", "f"]
SPLITS = ("train", "validation", "test")

Increments = Callable[..., tuple[Domain, tuple[Domain, ...]]]


def named(split: Dataset) -> dict[bytes, str]:
    """Which class each image is said to be of; the images of these tests are all different."""
    names = split.features["label"].names
    labels = [names[label] for label in split["label"]]
    return {np.asarray(image).tobytes(): label for image, label in zip(split["image"], labels, strict=True)}


@pytest.fixture
def whole(random_images: Callable[..., Dataset]) -> Domain:
    return Domain(**{key: random_images(60, NAMES, seed=seed) for seed, key in enumerate(SPLITS)})


@pytest.fixture
def spare(random_images: Callable[..., Dataset]) -> Dataset:
    return random_images(60, NAMES, seed=9)


@pytest.fixture
def increments(whole: Domain, spare: Dataset) -> Increments:
    def make(*new_classes: str, **options: int) -> tuple[Domain, tuple[Domain, ...]]:
        options = {"increments": 1, "rehearsal_size": 0, "adaptation_size": 512, "seed": 0} | options
        return class_increments(whole, spare, new_classes, **options)

    return make


def test_labels_are_the_old_classes_and_then_the_new_ones_in_the_given_order(increments: Increments) -> None:
    source, targets = increments("e", "b", "d", increments=2)
    assert source.class_names == ["a", "c", "f"]
    assert [target.class_names for target in targets] == [["a", "c", "f", "e", "b"], ["a", "c", "f", "e", "b", "d"]]
    for domain in (source, *targets):
        assert all(split.features["label"].names == domain.class_names for split in vars(domain).values())


def test_every_image_keeps_its_class(increments: Increments, whole: Domain, spare: Dataset) -> None:
    source, targets = increments("e", "b", "d", increments=2, rehearsal_size=20)
    truth = {key: named(split) for key, split in {**vars(whole), "spare": spare}.items()}
    for domain in (source, *targets):
        for key, split in vars(domain).items():
            assert named(split).items() <= (truth[key] | truth["spare"]).items()


def test_each_domain_holds_the_classes_it_should(increments: Increments) -> None:
    source, targets = increments("e", "b", "d", increments=2)
    classes = [[set(named(getattr(domain, key)).values()) for key in SPLITS] for domain in (source, *targets)]
    assert classes == [
        [set("acf"), set("acf"), set("acf")],
        [set("eb"), set("acfeb"), set("eb")],
        [set("d"), set("acfebd"), set("d")],
    ]


def test_new_images_come_from_the_spare_ones_and_kept_ones_from_what_was_trained_on(
    increments: Increments, whole: Domain, spare: Dataset
) -> None:
    _, (first, second) = increments("e", "b", "d", increments=2, rehearsal_size=20)
    old, new = named(whole.train), named(spare)
    trained = named(first.train)
    assert Counter(label for image, label in trained.items() if image in new) == {"e": 10, "b": 10}
    assert Counter(label for image, label in trained.items() if image in old) == {"a": 6, "c": 6, "f": 6}
    kept = {image: label for image, label in named(second.train).items() if label != "d"}
    assert kept.items() <= trained.items()  # a device has nothing else to keep
    assert Counter(kept.values()) == dict.fromkeys("acfeb", 4)


@pytest.mark.parametrize("rehearsal_size", [0, 5, 6, 23, 1000])
def test_the_budget_of_kept_images_holds_in_equal_shares(rehearsal_size: int, increments: Increments) -> None:
    _, targets = increments("e", "b", "d", increments=2, rehearsal_size=rehearsal_size)
    for target, group in zip(targets, ("eb", "d"), strict=True):
        kept = Counter(label for label in named(target.train).values() if label not in group)
        assert sum(kept.values()) <= rehearsal_size
        before = len(target.class_names) - len(group)
        assert set(kept.values()) <= {min(rehearsal_size // before, 10)}


def test_the_seed_chooses_the_kept_images(increments: Increments) -> None:
    first, again, other = (set(named(increments("e", rehearsal_size=10, seed=seed)[1][0].train)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_increment_has_at_most_as_many_new_images_as_asked_for(increments: Increments) -> None:
    _, targets = increments("e", "b", "d", increments=2, adaptation_size=8)
    assert [Counter(named(target.train).values()) for target in targets] == [{"e": 4, "b": 4}, {"d": 8}]


def test_nothing_is_shown_while_labels_are_renumbered(
    increments: Increments, capfd: pytest.CaptureFixture[str]
) -> None:
    increments("e", rehearsal_size=10)
    assert not capfd.readouterr().err
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("new_classes", "options", "message"),
    [
        (["g"], {}, "no class 'g'.*There are a, b, c, d, e, f"),
        (["e", "e"], {}, "expected each class once, found e, e"),
        (["a", "b", "c", "d", "e"], {}, "of 6 classes 1 would be left for the source"),
        (["e", "b"], {"increments": 3}, "increments: expected 1 to 2, .* found 3"),
        (["e", "b"], {"increments": 2, "rehearsal_size": 4}, "4 images cannot be shared among the 5 classes"),
    ],
)
def test_bad_input(new_classes: list[str], options: dict[str, int], message: str, increments: Increments) -> None:
    with pytest.raises(ValueError, match=message):
        increments(*new_classes, **options)


def test_a_class_without_images_is_named(whole: Domain, spare: Dataset) -> None:
    without = spare.filter(lambda label: label != 4, input_columns="label")
    with pytest.raises(ValueError, match="no images of the class 'e'"):
        class_increments(whole, without, ["e"], increments=1, rehearsal_size=0, adaptation_size=9, seed=0)


def digits(**options: int) -> Task:
    return load_task("digits", new_classes=["6", "7", "8", "9"], image_size=8, **options)


def test_unseen_digits_have_the_documented_sizes() -> None:
    task = digits(rehearsal_size=60)
    assert task.change == "new classes 6, 7, 8, 9"
    assert task.class_names == [str(digit) for digit in range(10)]
    assert [len(split) for split in vars(task.source).values()] == [422, 90, 330]
    assert [len(split) for split in vars(task.targets[0]).values()] == [159 + 60, 150, 217]


def test_the_source_does_not_depend_on_how_the_new_classes_come() -> None:
    one, many = digits(), digits(increments=4, rehearsal_size=40, adaptation_size=30)
    assert one.source.fingerprint == many.source.fingerprint
    assert one.fingerprint != many.fingerprint
    assert many.change == "new classes 6, 7, 8, 9 in 4 increments"
