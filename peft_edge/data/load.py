"""`load_task`: from two names to the images that a run needs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, DatasetDict

from peft_edge.data.digits import load_digits_domain
from peft_edge.data.shapes import load_shapes_domain
from peft_edge.data.shifts import SHIFTS, Shift
from peft_edge.data.sources import domain_from_splits, read_splits
from peft_edge.data.splits import carve
from peft_edge.data.task import Domain, Task

EMBEDDED: dict[str, Callable[..., tuple[Domain, Dataset]]] = {
    "digits": load_digits_domain,
    "shapes": load_shapes_domain,
}


def load_task(
    name: str,
    *,
    shift: str,
    severity: int | None = None,
    seed: int = 0,
    image_size: int = 48,
    adaptation_size: int = 512,
    subset: str | None = None,
    train_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Loads a source domain and a shifted target domain.

    With a corruption as the shift, both domains have the same validation and test images, as they are and shifted, and
    the images to adapt with are split off the source's training images (`digits` and `shapes` have their own).

    Args:
        name: `digits`, `shapes`, a folder with one subfolder for each class, or a Hugging Face dataset.
        shift: A corruption (one of `peft_edge.data.SHIFTS`), another split of the same data set, or another folder or
            Hugging Face dataset with the same classes.
        severity: 1 to 5, for a corruption that comes in degrees; by default 5.
        seed: Which image is in which split; for `shapes`, also what the images show.
        image_size: Height and width in pixels of the images of `digits` and `shapes`. Other images keep their size.
        adaptation_size: The largest number of images to adapt with.
        subset: The configuration of a Hugging Face dataset.
        train_split: The split to train on.
        image_column: The column of images, where there are several.
        label_column: The column of classes, where there are several.

    Returns:
        The task.

    Raises:
        ValueError: A name, shift, severity, split or column that does not exist, domains with different classes, an
            unreadable image file, or too few images.
    """
    # Before anything is read, since a large data set takes a while.
    corruption = Shift(shift, severity) if shift in SHIFTS else None
    if corruption is None:
        _refuse_misspelt("shift", shift, SHIFTS)
    columns = {"image_column": image_column, "label_column": label_column}

    splits = DatasetDict()
    adaptation = None
    if name in EMBEDDED:
        source, adaptation = EMBEDDED[name](image_size=image_size, seed=seed)
    else:
        _refuse_misspelt("data", name, EMBEDDED)
        splits = read_splits(name, subset=subset, **columns)
        source = domain_from_splits(name, splits, train_split=train_split, seed=seed)
        if corruption:
            rest, adaptation = carve(source.train, min(adaptation_size, len(source.train) // 4), seed=seed)
            source = replace(source, train=rest)
    class_names = source.train.features["label"].names

    if corruption:
        target = Domain(train=adaptation, validation=source.validation, test=source.test)
    elif shift in splits:
        target = domain_from_splits(name, DatasetDict(train=splits[shift]), train_split="train", seed=seed)
    else:
        splits = _with_classes_of(name, class_names, shift, _read_target(shift, subset=subset, **columns))
        target = domain_from_splits(shift, splits, train_split=train_split, seed=seed)
    if len(target.train) > adaptation_size:
        target = replace(target, train=carve(target.train, adaptation_size, seed=seed)[1])
    if corruption:
        target = Domain(**{key: corruption.shift_dataset(split) for key, split in vars(target).items()})
    return Task(name=name, shift=shift, class_names=class_names, source=source, target=target)


def _read_target(shift: str, **options: str | None) -> DatasetDict:
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
    if set(found) != set(class_names):
        missing, extra = sorted(set(class_names) - set(found)), sorted(set(found) - set(class_names))
        raise ValueError(
            f"the classes of {other!r} differ from those of {name!r}: missing {missing or 'none'}, "
            f"extra {extra or 'none'}. Rename or remove classes until both have the same"
        )
    if found == class_names:
        return splits
    return splits.align_labels_with_mapping({label: index for index, label in enumerate(class_names)}, "label")
