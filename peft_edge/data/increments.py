"""New classes: a source that knows some classes of a data set, and targets that bring the others, step by step.

A target's training images are those of its new classes and a few kept images of the classes before. Without such
rehearsal a classifier forgets what it knew; the fixed budget of kept images is that of iCaRL (Rebuffi et al. 2017).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)

from peft_edge.data.splits import carve
from peft_edge.data.task import Domain


def class_increments(
    domain: Domain,
    adaptation: Dataset,
    new_classes: Sequence[str],
    *,
    increments: int,
    rehearsal_size: int,
    adaptation_size: int,
    seed: int,
) -> tuple[Domain, tuple[Domain, ...]]:
    """Divides the classes of a domain among a source and one target for each increment.

    Labels are renumbered: the base classes come first, in their old order, then the new ones in the given order. So a
    label means the same in every domain, and a head that grows keeps its rows.

    Args:
        domain: Images of all classes.
        adaptation: Where the training images of the new classes come from; `domain.train` or images beside it.
        new_classes: The names of the classes that the source does not know.
        increments: In how many parts they come, as equal as possible.
        rehearsal_size: The largest number of kept images in all, in equal shares of the classes before; 0 for none.
        adaptation_size: The largest number of images of new classes in each increment.
        seed: Which images are kept. A share that shrinks as classes are added keeps a part of the same images.

    Returns:
        The source, and for each increment a target: its `train` holds the new classes and the kept images, its
        `validation` all classes known then, its `test` the new classes.

    Raises:
        ValueError: Unknown or repeated names, fewer than two base classes, more increments than new classes, fewer kept
            images than classes, or no images of a class.
    """
    base = [name for name in domain.class_names if name not in new_classes]
    _check_classes(domain.class_names, new_classes, base, increments)
    groups = [part.tolist() for part in np.array_split(new_classes, increments)]
    largest = len(base) + sum(map(len, groups[:-1]))
    if 0 < rehearsal_size < largest:
        raise ValueError(
            f"rehearsal_size: {rehearsal_size} images cannot be shared among the {largest} classes before the last "
            f"increment: keep at least {largest}, or none (0)"
        )

    source = Domain(**{key: _renumbered(_images_of(split, base), base) for key, split in vars(domain).items()})
    known, targets = base, []
    trained = [_images_of(domain.train, base)]
    for group in groups:
        images = _images_of(adaptation, group)
        if len(images) > adaptation_size:
            images = carve(images, adaptation_size, seed=seed)[1]
        share = rehearsal_size // len(known)
        kept = [_first_of_each_class(part, share, seed=seed) for part in trained] if share else []
        trained.append(images)
        known = [*known, *group]
        target = Domain(
            train=concatenate_datasets([images, *kept]),
            validation=_images_of(domain.validation, known),
            test=_images_of(domain.test, group),
        )
        targets.append(Domain(**{key: _renumbered(split, known) for key, split in vars(target).items()}))
    return source, tuple(targets)


def _check_classes(names: list[str], new_classes: Sequence[str], base: list[str], increments: int) -> None:
    for name in new_classes:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"new_classes: there is no class {name!r}; did you mean {nearest!r}? There are {', '.join(names)}"
            )
    if len(set(new_classes)) < len(new_classes):
        raise ValueError(f"new_classes: expected each class once, found {', '.join(new_classes)}")
    if len(base) < 2:
        raise ValueError(
            f"new_classes: of {len(names)} classes {len(base)} would be left for the source, expected at least two: "
            "name fewer new classes"
        )
    if not 1 <= increments <= len(new_classes):
        raise ValueError(f"increments: expected 1 to {len(new_classes)}, one new class each, found {increments}")


def _images_of(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    feature = dataset.features["label"]
    labels = np.array(dataset["label"][:])
    wanted = [feature.str2int(name) for name in classes]
    if missing := [name for name, label in zip(classes, wanted, strict=True) if label not in labels]:
        raise ValueError(
            f"there are no images of the class {missing[0]!r} in a split that needs them: add some to every split, or "
            "let training, validation and test images be split off one (leave only `train`)"
        )
    return dataset.select(np.flatnonzero(np.isin(labels, wanted)))


def _first_of_each_class(dataset: Dataset, count: int, *, seed: int) -> Dataset:
    """At most `count` images of each class, the first of an order that only the seed decides."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    labels = np.array(dataset["label"][:])[order]
    chosen = [order[labels == label][:count] for label in np.unique(labels)]
    return dataset.select(np.concatenate(chosen))


def _renumbered(dataset: Dataset, names: list[str]) -> Dataset:
    """The same images, with the index of their class in `names` as the label."""
    old = dataset.features["label"]
    labels = [names.index(name) for name in old.int2str(dataset["label"][:])]
    with _no_progress_bars():
        return dataset.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` copies the chosen images and would show a bar for every split."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
