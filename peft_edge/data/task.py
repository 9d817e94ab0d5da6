"""Load a task: a source domain, and target domains whose images are shifted or show new classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

from peft_edge.data.corruptions import SHIFTS, Shift
from peft_edge.data.domain import Domain, Task, read_into_memory, stratified_split
from peft_edge.data.embedded import load_digits_domain, load_shapes_domain
from peft_edge.data.folders import Filter, choose_domains, class_folders, domain_label
from peft_edge.data.sources import domain_from_splits, read_splits
from peft_edge.names import did_you_mean, problem_of_data, problem_of_shift, split_of

logger = logging.getLogger(__name__)

EMBEDDED: dict[str, Callable[..., tuple[Domain, Dataset]]] = {
    "digits": load_digits_domain,
    "shapes": load_shapes_domain,
}
"""A dict from the name of each embedded benchmark to the function that loads the benchmark.

The function returns the source domain, and a separate dataset with the images that a model is adapted to.
"""


def load_task(
    name: str,
    *,
    shift: str | None = None,
    severity: int | None = None,
    source_filters: Sequence[Filter] = (),
    shift_filters: Sequence[Filter] = (),
    new_classes: Sequence[str] = (),
    increments: int = 1,
    rehearsal_size: int = 0,
    seed: int = 0,
    image_size: int = 48,
    adaptation_size: int | None = None,
    subset: str | None = None,
    train_split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Load a source domain and its targets: one target with shifted images, or one or more targets with new classes.

    If `shift` is a corruption, the target has corrupted copies of the source's validation and test images. The training
    images of the target are corrupted, too, but the source does not contain them. For `digits` and `shapes`, they are a
    separate set of images. For other data, at most a quarter of the source's training images moves to the target. If
    `new_classes` are given, the source contains only the other classes. `class_increments` describes the targets.

    Args:
        name: An embedded benchmark (`digits` or `shapes`), or a folder with one subfolder for each class, or the name
            of a Hugging Face dataset.
        shift: One of the following: a corruption (one of `peft_edge.data.SHIFTS`), the name of another split of the
            same dataset, or another folder or Hugging Face dataset with the same classes.
        severity: For a corruption with severities, a number from 1 (mild) to 5 (strong); None means 5. In all other
            cases, it must be None.
        source_filters: Conditions (column, operator, value) that rows of the source must meet, such as
            `[("domain", "==", "photo")]`. If there are conditions, `name` must be a Hugging Face dataset or a folder
            with one subfolder per domain. The only column of such a folder is `domain`, which contains the
            name of the subfolder.
        shift_filters: Conditions that rows of the target must meet, such as `[("corruption_name", "==", "fog"),
            ("corruption_level", "==", 3)]`. If there are conditions, the target is read from `shift` or, if `shift` is
            None, from `name`. The conditions apply to a Hugging Face dataset or to a folder with one subfolder per
            domain, but not to a split.
        new_classes: The names of the classes that are not in the source. Must be empty if `shift` is given.
        increments: The number of targets with new classes. `new_classes` are divided among these targets.
        rehearsal_size: The maximum number of images that are added to the training images of each target, to rehearse
            the classes of the source and of earlier targets.
        seed: The seed for drawing all splits, and for rendering the images of `shapes`.
        image_size: Height and width in pixels of the images of `digits` and `shapes`. Other images keep their size.
        adaptation_size: The maximum number of training images in each target, not counting rehearsal images. None sets
            no limit. If images of the target are left out, a warning states how many.
        subset: The configuration of a Hugging Face dataset. If `shift` is another dataset, `subset`, `train_split`,
            `image_column` and `label_column` apply to both datasets.
        train_split: The name of the split to train on.
        image_column: The name of the image column. Required if there are several image columns.
        label_column: The name of the label column. Required if there are several label columns.

    Raises:
        ValueError: If a name, shift, severity, class, split or column does not exist. If both or neither of `shift` and
            `new_classes` are given, or if another argument does not apply to this kind of task. If source and target of
            a shift have different classes. If an image file is damaged, or if there are too few images.

    Example:
        >>> task = load_task("digits", shift="invert", image_size=16)
        >>> len(task.source.train), len(task.targets[0].train), task.num_classes
        (700, 400, 10)
    """
    # Check the arguments before any data is read, because reading a large dataset takes minutes.
    if shift is None and shift_filters:
        shift = name
    if Path(name).expanduser().is_dir():
        # `read_splits` renames the splits of a folder. For example, val/ becomes `validation`.
        train_split, shift = split_of(train_split) or train_split, split_of(shift or "") or shift
    if shift == train_split and not shift_filters:
        raise ValueError(f"shift: {shift!r} is the split that the source is trained on: name another one")
    _check_change(name, shift, severity, source_filters, shift_filters, new_classes, increments, rehearsal_size)
    if problem := problem_of_data(name) or (problem_of_shift(shift, name) if shift is not None else None):
        raise ValueError(problem)
    for place, filters in ((name, source_filters), (shift, shift_filters)):
        if filters and place is not None and Path(place).expanduser().is_dir():
            choose_domains(Path(place).expanduser(), filters)

    splits, adaptation = DatasetDict(), None
    if name in EMBEDDED:
        source, adaptation = EMBEDDED[name](image_size=image_size, seed=seed)
    else:
        splits = read_splits(
            name, subset=subset, filters=source_filters, image_column=image_column, label_column=label_column
        )
        # If `shift` is a split of `name`, this split is the target and must not be part of the source.
        own = DatasetDict({key: split for key, split in splits.items() if key != shift})
        source = domain_from_splits(name, own, train_split=train_split, seed=seed)
    contents = {content for split in vars(source).values() for content in _contents(split)}
    source = _without_contents(source)

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
        return Task(name=domain_label(name, source_filters), change=change, source=source, targets=targets)

    if shift in SHIFTS:
        if adaptation is None:
            quarter = len(source.train) // 4
            size = quarter if adaptation_size is None else min(adaptation_size, quarter)
            rest, adaptation = stratified_split(source.train, size, seed=seed)
            source = replace(source, train=rest)
        target = replace(source, train=adaptation)
    elif shift in splits and not shift_filters:
        target = domain_from_splits(
            f"the split {shift!r} of {name}",
            DatasetDict(train=splits[shift]),
            train_split="train",
            seed=seed,
            exclude=contents,
        )
    else:
        try:
            if problem := problem_of_data(shift):  # for example, a split that the dataset on the Hub does not have
                raise ValueError(problem)
            other = read_splits(
                shift, subset=subset, filters=shift_filters, image_column=image_column, label_column=label_column
            )
        except ValueError as error:
            if Path(shift).expanduser().is_dir():
                raise  # the message of `error` already names the folder or file
            found = f" ({', '.join(splits)})" if splits else ""
            raise ValueError(
                f"shift {shift!r} is neither a corruption ({', '.join(SHIFTS)}), nor a split of the data{found}, nor "
                f"data that can be read: {error}"
            ) from error
        other = _with_classes_of(source, other, names=(name, shift))
        if all(Path(place).expanduser().is_dir() for place in (name, shift)):
            _warn_unequal_splits(
                {domain_label(name, source_filters): splits, domain_label(shift, shift_filters): other}
            )
        target = domain_from_splits(shift, other, train_split=train_split, seed=seed, exclude=contents)
    target = _without_contents(target)
    target = replace(target, train=_limited(target.train, adaptation_size, seed=seed))
    if shift in SHIFTS:
        shifted = {key: Shift(shift, severity).shift_dataset(split) for key, split in vars(target).items()}
        if name in EMBEDDED:
            # Corrupt the images once. Training would take a fifth longer if each access corrupted an image again.
            shifted = {key: read_into_memory(split) for key, split in shifted.items()}
        target = Domain(**shifted)
    change = domain_label(shift, shift_filters) + (f" at severity {severity}" if severity is not None else "")
    return Task(name=domain_label(name, source_filters), change=change, source=source, targets=(target,))


def load_configured_task(data: Mapping[str, Any], *, seed: int) -> Task:
    """Load the task that the section `data` of a `train.py` configuration describes.

    The key `augment` of this section is ignored, because augmentation does not change the task.

    Raises:
        ValueError: If `load_task` raises a ValueError.
    """
    return load_task(**{key: value for key, value in data.items() if key != "augment"}, seed=seed)


def _warn_unequal_splits(both: Mapping[str, DatasetDict]) -> None:
    """Warn if only one of source and target has a test split.

    `both` is a dict from the names of the two datasets to their splits.
    """
    without = [name for name, splits in both.items() if "test" not in splits]
    if len(without) == 1:
        logger.warning(
            "only one of %s has a test split. The test images of %s are drawn from its training images, so the "
            "accuracies on source and target are not comparable: give both a test split, or neither",
            " and ".join(both),
            without[0],
        )


def _limited(images: Dataset, size: int | None, *, seed: int) -> Dataset:
    """Return `size` random images with the class proportions of `images`, and warn that the others are left out.

    If `size` is None, or there are at most `size` images, return `images` without a warning.
    """
    if size is None or len(images) <= size:
        return images
    logger.warning(f"adapting with {size:,} of {len(images):,} images, because of data.adaptation_size")
    return stratified_split(images, size, seed=seed)[1]


def _contents(split: Dataset) -> list[str]:
    return split["content"][:] if "content" in split.column_names else []


def _without_contents(domain: Domain) -> Domain:
    """Return a copy of the domain whose splits have only the columns `image` and `label`."""
    return Domain(**{key: split.select_columns(["image", "label"]) for key, split in vars(domain).items()})


def class_increments(
    domain: Domain,
    adaptation: Dataset,
    new_classes: Sequence[str],
    *,
    increments: int,
    rehearsal_size: int,
    adaptation_size: int | None,
    seed: int,
) -> tuple[Domain, tuple[Domain, ...]]:
    """Split a domain by its classes. Return a source domain, and one target domain for each increment of new classes.

    The source has the base classes (all classes that are not new). Each increment is a part of `new_classes`. For an
    increment, "earlier classes" are the base classes and the classes of the increments before it.

    Without rehearsal, a classifier forgets earlier classes. The training images of a target with n earlier classes
    therefore include up to `rehearsal_size // n` images of each earlier class, as in iCaRL (Rebuffi et al. 2017).
    Labels are renumbered: first the base classes in their old order, then `new_classes` in the given order. A label
    means the same class in all domains. Training images of new classes come from `adaptation`, and all other images
    come from `domain`. `load_task` describes the other arguments.

    Returns:
        The source, and a tuple with one target for each increment. In a target, `train` contains the classes of the
        increment and the rehearsal images. `validation` contains the classes of the increment and all earlier classes.
        `test` contains only the classes of the increment.

    Raises:
        ValueError: If a class name is unknown or repeated, or a class has no images. If there are fewer than two base
            classes, or more increments than new classes. If `rehearsal_size` is positive, but less than the number of
            earlier classes of the last increment.
    """
    base = [name for name in domain.class_names if name not in new_classes]
    _check_classes(domain.class_names, new_classes, base, increments)
    groups = [part.tolist() for part in np.array_split(new_classes, increments)]
    num_earlier = len(base) + sum(map(len, groups[:-1]))
    if rehearsal_size and rehearsal_size < num_earlier:
        raise ValueError(
            f"rehearsal_size: {rehearsal_size} images cannot be shared among the {num_earlier} classes before the last "
            f"increment: set at least {num_earlier}, or 0"
        )

    source = Domain(**{key: _renumber(_select_classes(split, base), base) for key, split in vars(domain).items()})
    known, targets = base, []
    earlier = [_select_classes(domain.train, base)]
    for group in groups:
        images = _limited(_select_classes(adaptation, group), adaptation_size, seed=seed)
        share = rehearsal_size // len(known)
        rehearsal = [_select_per_class(part, share, seed=seed) for part in earlier] if share else []
        earlier.append(images)
        known = [*known, *group]
        splits = {
            "train": concatenate_datasets([images, *rehearsal]),
            "validation": _select_classes(domain.validation, known),
            "test": _select_classes(domain.test, group),
        }
        targets.append(Domain(**{key: _renumber(split, known) for key, split in splits.items()}))
    return source, tuple(targets)


def _select_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    labels = np.array(dataset["label"][:])
    wanted = dataset.features["label"].str2int(list(classes))
    if missing := [name for name, label in zip(classes, wanted, strict=True) if label not in labels]:
        raise ValueError(
            f"there are no images of the class {missing[0]!r} in a split that needs them: add some to every split, or "
            "provide only `train`, from which validation and test images are then drawn"
        )
    return dataset.select(np.flatnonzero(np.isin(labels, wanted)))


def _select_per_class(dataset: Dataset, count: int, *, seed: int) -> Dataset:
    """Return at most `count` random images of each class. The same `dataset` and `seed` select the same images."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    labels = np.array(dataset["label"][:])[order]
    return dataset.select(np.concatenate([order[labels == label][:count] for label in np.unique(labels)]))


def _renumber(dataset: Dataset, names: list[str]) -> Dataset:
    """Return the dataset with each label replaced by the index of its class in `names`."""
    labels = [names.index(name) for name in dataset.features["label"].int2str(dataset["label"][:])]
    # `add_column` copies the images if rows were selected before, and would show a progress bar for each split.
    show_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return dataset.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))
    finally:
        if show_bars:
            datasets.enable_progress_bars()


def _with_classes_of(source: Domain, splits: DatasetDict, *, names: tuple[str, str]) -> DatasetDict:
    """Return the `splits` of a target with labels in the class order of `source`.

    `names` are the names or folders of source and target. The labels of a Hugging Face dataset may be only the numbers
    0, 1, ... If the target is such a dataset but the classes of the source have names, the numbers are read as indices
    of the source's classes.

    Raises:
        ValueError: If source and target have different class names.
    """
    expected, found = source.class_names, next(iter(splits.values())).features["label"].names
    has_names = Path(names[1]).expanduser().is_dir() or all(name.isdecimal() for name in expected)
    if not has_names and found == [str(index) for index in range(len(expected))]:
        return splits.cast_column("label", ClassLabel(names=expected))
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        empty = [*class_folders(Path(names[1]), missing), *class_folders(Path(names[0]), extra)]
        only = [
            f"only {name!r} has {', '.join(part)}" for name, part in zip(names, (missing, extra), strict=True) if part
        ]
        raise ValueError(
            f"{names[0]!r} and {names[1]!r} have images of different classes: {', and '.join(only)}. "
            + (f"There are folders without images: {', '.join(map(str, empty))}. " if empty else "")
            + "Add images, rename or remove classes until both have the same"
        )
    mapping = {name: index for index, name in enumerate(expected)}
    return splits if found == expected else splits.align_labels_with_mapping(mapping, "label")


def _check_classes(names: list[str], new_classes: Sequence[str], base: list[str], increments: int) -> None:
    for name in new_classes:
        if name not in names:
            raise ValueError(
                f"new_classes: there are no images of a class {name!r}, only of {', '.join(names)}"
                f"{did_you_mean(name, names)}"
            )
    if len(set(new_classes)) < len(new_classes):
        raise ValueError(f"new_classes: expected each class once, found {', '.join(new_classes)}")
    if len(base) < 2:
        raise ValueError(
            f"new_classes: of {len(names)} classes {len(base)} would be left for the source, expected at least two: "
            "name fewer new classes"
        )
    if not 1 <= increments <= len(new_classes):
        raise ValueError(f"increments: expected 1 to {len(new_classes)}, the number of new classes, found {increments}")


def _check_change(
    name: str,
    shift: str | None,
    severity: int | None,
    source_filters: Sequence[Filter],
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
    may_filter = shift is not None and shift not in {*SHIFTS, *EMBEDDED}
    filtered = "a Hugging Face dataset, or a folder of domains,"
    if source_filters and name in EMBEDDED:
        raise ValueError(
            f"source_filters applies to {filtered} only: leave it out with {name!r}; found {source_filters}"
        )
    for is_misplaced, key, value, owner in (
        (severity is not None and shift not in SHIFTS, "severity", severity, "a corruption"),
        (shift_filters and not may_filter, "shift_filters", shift_filters, filtered),
        (shift is not None and increments != 1, "increments", increments, "new classes"),
        (shift is not None and rehearsal_size, "rehearsal_size", rehearsal_size, "new classes"),
    ):
        if is_misplaced:
            raise ValueError(f"{key} applies to {owner} only: leave it out with {change}; found {value}")
    if shift in SHIFTS:
        Shift(shift, severity)  # checks the severity
