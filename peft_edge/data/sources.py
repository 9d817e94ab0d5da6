"""Any Hugging Face dataset, or any folder of images, as splits with the columns `image` and `label`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PillowImage

from peft_edge.data.domain import Domain, stratified_split

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
LABEL_NAMES = ("label", "labels")


Filter = Sequence[Any]
"""A column, one of == != < <= > >= in, and a value."""


def read_splits(
    name: str,
    *,
    subset: str | None = None,
    filters: Sequence[Filter] = (),
    image_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """Reads a data set and leaves of it an image and a label column.

    Args:
        name: A folder with one subfolder for each class (below `train`, `validation` and `test`, if it has these), or a
            Hugging Face dataset.
        subset: The configuration of a Hugging Face dataset.
        filters: The rows to read of a Hugging Face dataset in Parquet files: those that pass all of them.
        image_column: Its column of images; by default the one whose feature is `datasets.Image`.
        label_column: Its column of classes; by default the one whose feature is `datasets.ClassLabel`, else `label`.

    Returns:
        The splits that have labels, each with the columns `image` and `label`, and all with the same class names.

    Raises:
        ValueError: No such data, a column that is missing or ambiguous, an unreadable image file, or a single class.
    """
    folder = Path(name).expanduser()
    splits = _read_folder(folder) if folder.is_dir() else _read_from_hub(name, subset, filters)
    features = next(iter(splits.values())).features
    columns = {
        _image_column(name, features, image_column): "image",
        _label_column(name, features, label_column): "label",
    }
    splits = splits.select_columns(list(columns)).rename_columns(columns)
    splits = _with_class_names(splits)
    class_names = next(iter(splits.values())).features["label"].names
    if len(class_names) < 2:
        raise ValueError(
            f"{name!r} has one class, {class_names[0]!r}; expected at least two. "
            "A folder needs one subfolder for each class, with that class's images inside"
        )
    # Published test splits often hide their labels as -1.
    return DatasetDict({key: split for key, split in splits.items() if min(split["label"][:]) >= 0})


def domain_from_splits(name: str, splits: DatasetDict, *, train_split: str, seed: int) -> Domain:
    """Makes a domain, splitting off the training images what the data set has no split for.

    Args:
        name: The data set, for error messages.
        splits: From `read_splits`.
        train_split: The split to train on.
        seed: Which images become the validation (a tenth) and test images (a fifth), where these are missing.

    Raises:
        ValueError: No such split, or too few images to split.
    """
    if train_split not in splits:
        raise ValueError(f"{name!r} has no labelled split {train_split!r}: name one of {', '.join(splits)}")
    train = splits[train_split]
    classes, images = len(train.features["label"].names), len(train)
    validation = next((splits[key] for key in VALIDATION_NAMES if key in splits), None)
    test = splits.get("test")
    if test is None:
        train, test = stratified_split(train, max(classes, images // 5), seed=seed)
    if validation is None:
        train, validation = stratified_split(train, max(classes, images // 10), seed=seed)
    return Domain(train=train, validation=validation, test=test)


def _read_folder(folder: Path) -> DatasetDict:
    # Only folders of exactly these names are splits; left to itself, the builder takes any `test` in any name for one.
    names = [name for name in ("train", *VALIDATION_NAMES, "test") if (folder / name).is_dir()]
    is_split = "train" in names and all(child.name in names for child in folder.iterdir() if child.is_dir())
    files = {name: f"{name}/**" for name in names} if is_split else {"train": "**"}
    try:
        splits = load_dataset("imagefolder", data_dir=str(folder.resolve()), data_files=files, drop_labels=False)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"the folder {str(folder)!r} holds no images: expected one subfolder for each class"
        ) from error
    for split in splits.values():
        for image in split.cast_column("image", Image(decode=False))["image"]:
            _check_image(image["path"])
    return splits


def _check_image(path: str) -> None:
    # Only the structure of the file is read, so a folder of photographs is checked in seconds; the loader names a file
    # whose pixels turn out to be damaged.
    try:
        with PillowImage.open(path) as image:
            image.verify()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot read the image file {path!r}: {error}; replace or remove it") from error


def _read_from_hub(name: str, subset: str | None, filters: Sequence[Filter]) -> DatasetDict:
    # The sizes in the card are those of all rows.
    options = {"filters": [tuple(part) for part in filters], "verification_mode": "no_checks"} if filters else {}
    try:
        return load_dataset(name, subset, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"cannot load the data {name!r}: expected 'digits', 'shapes', a folder that exists, or a Hugging Face "
            f"dataset{f' with rows that pass the filters {filters}' if filters else ''}. The answer: "
            f"{error.__cause__ or error}"
        ) from error


def _image_column(name: str, features: dict[str, object], wanted: str | None) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    return _only_column(name, features, wanted, found, "image")


def _label_column(name: str, features: dict[str, object], wanted: str | None) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    return _only_column(name, features, wanted, found or [key for key in LABEL_NAMES if key in features], "label")


def _only_column(name: str, features: dict[str, object], wanted: str | None, found: list[str], kind: str) -> str:
    if wanted is not None and wanted in features:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    problem = f"has no column {wanted!r}" if wanted else f"has {len(found) or 'no'} columns that could be the {kind}"
    raise ValueError(f"{name!r} {problem}: set {kind}_column to one of {', '.join(found or features)}")


def _with_class_names(splits: DatasetDict) -> DatasetDict:
    """Turns labels that are plain numbers or words into classes, the same in every split."""
    first: Dataset = next(iter(splits.values()))
    if isinstance(first.features["label"], ClassLabel):
        return splits
    names = [str(value) for value in sorted({value for split in splits.values() for value in split.unique("label")})]
    return splits.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))
