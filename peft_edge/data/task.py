"""New classes: a source that knows some classes of a data set, and targets that bring the others, step by step.

A target's training images are those of its new classes and a few kept images of the classes before. Without such
rehearsal a classifier forgets what it knew; the fixed budget of kept images is that of iCaRL (Rebuffi et al. 2017).

`load_task`: from two names to the images that a run needs.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)

from peft_edge.data.corruptions import SHIFTS, Shift
from peft_edge.data.domain import Domain, Task, read_into_memory, stratified_split
from peft_edge.data.embedded import load_digits_domain, load_shapes_domain
from peft_edge.data.sources import Filter, domain_from_splits, read_splits


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
            images = stratified_split(images, adaptation_size, seed=seed)[1]
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


EMBEDDED: dict[str, Callable[..., tuple[Domain, Dataset]]] = {
    "digits": load_digits_domain,
    "shapes": load_shapes_domain,
}


def load_task(
    name: str,
    *,
    shift: str | None = None,
    severity: int | None = None,
    shift_filters: Sequence[Filter] = (),
    new_classes: Sequence[str] = (),
    increments: int = 1,
    rehearsal_size: int = 0,
    seed: int = 0,
    image_size: int = 48,
    adaptation_size: int = 512,
    subset: str | None = None,
    train_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Loads a source domain, and either one target that has shifted or targets that bring new classes.

    With a corruption as the shift, both domains have the same validation and test images, as they are and shifted, and
    the images to adapt with are split off the source's training images (`digits` and `shapes` have their own).

    With new classes, the source holds the other ones; see `class_increments` for what the targets hold.

    Args:
        name: `digits`, `shapes`, a folder with one subfolder for each class, or a Hugging Face dataset.
        shift: A corruption (one of `peft_edge.data.SHIFTS`), another split of the same data set, or another folder or
            Hugging Face dataset with the same classes.
        severity: 1 to 5, for a corruption that comes in degrees; by default 5.
        shift_filters: Which rows to read of a Hugging Face dataset that is the shift, as a column, an operator and a
            value each: `[("corruption_name", "==", "fog"), ("corruption_level", "==", 3)]`.
        new_classes: Instead of a shift, the names of the classes that the source does not know.
        increments: In how many parts the new classes come.
        rehearsal_size: The largest number of images of earlier classes that each increment sees again.
        seed: Which image is in which split; for `shapes`, also what the images show.
        image_size: Height and width in pixels of the images of `digits` and `shapes`. Other images keep their size.
        adaptation_size: The largest number of images to adapt with; of new classes, in each increment.
        subset: The configuration of a Hugging Face dataset.
        train_split: The split to train on.
        image_column: The column of images, where there are several.
        label_column: The column of classes, where there are several.

    Returns:
        The task.

    Raises:
        ValueError: A name, shift, severity, class, split or column that does not exist, both a shift and new classes or
            neither, domains with different classes, an unreadable image file, or too few images.
    """
    # Before anything is read, since a large data set takes a while.
    _check_change(shift, severity, shift_filters, new_classes, increments, rehearsal_size)
    if name not in EMBEDDED:
        _refuse_misspelt("data", name, EMBEDDED)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}

    splits, adaptation = DatasetDict(), None
    if name in EMBEDDED:
        source, adaptation = EMBEDDED[name](image_size=image_size, seed=seed)
    else:
        splits = read_splits(name, subset=subset, **columns)
        source = domain_from_splits(name, splits, train_split=train_split, seed=seed)

    if shift is None:
        source, targets = class_increments(
            source,
            source.train if adaptation is None else adaptation,
            new_classes,
            increments=increments,
            rehearsal_size=rehearsal_size,
            adaptation_size=adaptation_size,
            seed=seed,
        )
        change = f"new classes {', '.join(new_classes)}" + (f" in {increments} increments" if increments > 1 else "")
        return Task(name=name, change=change, source=source, targets=targets)

    if shift in SHIFTS:
        if adaptation is None:
            rest, adaptation = stratified_split(source.train, min(adaptation_size, len(source.train) // 4), seed=seed)
            source = replace(source, train=rest)
        target = replace(source, train=adaptation)
    elif shift in splits and not shift_filters:
        target = domain_from_splits(name, DatasetDict(train=splits[shift]), train_split="train", seed=seed)
    else:
        other = _read_target(shift, subset=subset, filters=shift_filters, **columns)
        other = _with_classes_of(name, source.class_names, shift, other)
        target = domain_from_splits(shift, other, train_split=train_split, seed=seed)
    if len(target.train) > adaptation_size:
        target = replace(target, train=stratified_split(target.train, adaptation_size, seed=seed)[1])
    if shift in SHIFTS:
        corruption = Shift(shift, severity)
        shifted = {key: corruption.shift_dataset(split) for key, split in vars(target).items()}
        if name in EMBEDDED:
            # Small enough to be shifted once, which otherwise takes a fifth of the time of training on them.
            shifted = {key: read_into_memory(split) for key, split in shifted.items()}
        target = Domain(**shifted)
    change = shift if severity is None else f"{shift} at severity {severity}"
    return Task(name=name, change=change, source=source, targets=(target,))


def _check_change(
    shift: str | None,
    severity: int | None,
    shift_filters: Sequence[Filter],
    new_classes: Sequence[str],
    increments: int,
    rehearsal_size: int,
) -> None:
    if (shift is None) == (not new_classes):
        raise ValueError(
            f"a task is either a shift or new classes, found {shift!r} and {list(new_classes)}: set one of shift and "
            "new_classes"
        )
    change = "new classes" if shift is None else f"the shift {shift!r}"
    if severity is not None and shift not in SHIFTS:
        raise ValueError(f"severity belongs to a corruption: leave it out with {change}; found {severity}")
    if shift_filters and (shift is None or shift in SHIFTS or Path(shift).expanduser().is_dir()):
        raise ValueError(
            f"shift_filters belong to a Hugging Face dataset: leave them out with {change}; found {shift_filters}"
        )
    if shift is not None and (increments != 1 or rehearsal_size):
        raise ValueError(
            f"increments and rehearsal_size belong to new classes: leave them out with {change}; found {increments} "
            f"and {rehearsal_size}"
        )
    if shift in SHIFTS:
        Shift(shift, severity)
    elif shift is not None:
        _refuse_misspelt("shift", shift, SHIFTS)


def _read_target(shift: str, **options: Any) -> DatasetDict:
    try:
        return read_splits(shift, **options)
    except ValueError as error:
        raise ValueError(
            f"shift {shift!r} is neither a corruption ({', '.join(SHIFTS)}), nor a split of the data, nor data that "
            f"can be read: {error}"
        ) from error


def _refuse_misspelt(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuses what can be no data set before the Hub is asked, which without a network takes half a minute to fail."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    if Path(name).expanduser().is_dir() or not (nearest or name.startswith((".", "~", os.sep))):
        return
    hint = f"did you mean {nearest[0]!r}?" if nearest else "there is no such folder."
    raise ValueError(
        f"unknown {kind} {name!r}: {hint} Expected {', '.join(known)}, a folder that exists, or a Hugging Face dataset"
    )


def _with_classes_of(name: str, class_names: list[str], other: str, splits: DatasetDict) -> DatasetDict:
    """Renumbers the labels of another data set, since the same classes may come in another order."""
    found = next(iter(splits.values())).features["label"].names
    if found == [str(index) for index in range(len(class_names))]:
        # Labels that are plain numbers have no names of their own, so they are taken to count the same classes.
        return splits.cast_column("label", ClassLabel(names=class_names))
    if set(found) != set(class_names):
        missing, extra = sorted(set(class_names) - set(found)), sorted(set(found) - set(class_names))
        raise ValueError(
            f"the classes of {other!r} differ from those of {name!r}: missing {missing or 'none'}, "
            f"extra {extra or 'none'}. Rename or remove classes until both have the same"
        )
    if found == class_names:
        return splits
    return splits.align_labels_with_mapping({label: index for index, label in enumerate(class_names)}, "label")
