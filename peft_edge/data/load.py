"""`load_task`: from two names to the images that a run needs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from peft_edge.data.arrays import read_into_memory
from peft_edge.data.digits import load_digits_domain
from peft_edge.data.increments import class_increments
from peft_edge.data.shapes import load_shapes_domain
from peft_edge.data.shifts import SHIFTS, Shift
from peft_edge.data.sources import Filter, domain_from_splits, read_splits
from peft_edge.data.splits import carve
from peft_edge.data.task import Domain, Task

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
            rest, adaptation = carve(source.train, min(adaptation_size, len(source.train) // 4), seed=seed)
            source = replace(source, train=rest)
        target = replace(source, train=adaptation)
    elif shift in splits and not shift_filters:
        target = domain_from_splits(name, DatasetDict(train=splits[shift]), train_split="train", seed=seed)
    else:
        other = _read_target(shift, subset=subset, filters=shift_filters, **columns)
        other = _with_classes_of(name, source.class_names, shift, other)
        target = domain_from_splits(shift, other, train_split=train_split, seed=seed)
    if len(target.train) > adaptation_size:
        target = replace(target, train=carve(target.train, adaptation_size, seed=seed)[1])
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
