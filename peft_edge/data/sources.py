"""Image folders and Hugging Face datasets, read as splits with the columns `image` and `label`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PillowImage

from peft_edge.data.domain import Domain, stratified_split

Filter = Sequence[str | int | float]
"""A column, an operator (== != < <= > >= in), and a value."""

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_LABEL_NAMES = ("label", "labels")


def read_splits(
    name: str,
    *,
    subset: str | None = None,
    filters: Sequence[Filter] = (),
    image_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """Read the labelled splits of a dataset, with the columns `image` and `label` and the same classes in every split.

    Args:
        name: A folder with one subfolder for each class (inside `train`, `validation` and `test`, if they exist), or
            the name of a Hugging Face dataset.
        subset: The name of a configuration of a Hugging Face dataset.
        filters: Conditions that all rows must meet. They apply to Hugging Face datasets in Parquet files only.
        image_column: The image column; by default the only column with the feature `datasets.Image`.
        label_column: The label column; by default the only `datasets.ClassLabel` column, or `label` or `labels`.

    Raises:
        ValueError: If the data cannot be loaded, a column is missing or ambiguous, an image file is damaged, or there
            is a single class.
    """
    folder = Path(name).expanduser()
    splits = _read_folder(folder) if folder.is_dir() else _read_from_hub(name, subset, filters)
    features = next(iter(splits.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [column for column in _LABEL_NAMES if column in features]
    columns = {
        _choose_column(name, features, "image", image_column, images): "image",
        _choose_column(name, features, "label", label_column, labels): "label",
    }
    splits = _with_class_names(splits.select_columns(list(columns)).rename_columns(columns))
    class_names = next(iter(splits.values())).features["label"].names
    if len(class_names) < 2:
        raise ValueError(
            f"{name!r} has one class, {class_names[0]!r}; expected at least two. "
            "A folder needs one subfolder for each class, with that class's images inside"
        )
    # Published test splits often hide their labels as -1.
    return DatasetDict({key: split for key, split in splits.items() if min(split["label"][:]) >= 0})


def domain_from_splits(name: str, splits: DatasetDict, *, train_split: str, seed: int) -> Domain:
    """Build a domain; split validation and test images off the training images where the dataset has none.

    Missing splits get a tenth of the images for validation and a fifth for tests, drawn with `seed`. `name` is the
    dataset's name in error messages.

    Raises:
        ValueError: If there is no such split, or there are too few images to split.
    """
    if train_split not in splits:
        raise ValueError(f"{name!r} has no labelled split {train_split!r}: name one of {', '.join(splits)}")
    train = splits[train_split]
    classes, images = len(train.features["label"].names), len(train)
    validation = next((splits[key] for key in _VALIDATION_NAMES if key in splits), None)
    test = splits.get("test")
    if test is None:
        train, test = stratified_split(train, max(classes, images // 5), seed=seed)
    if validation is None:
        train, validation = stratified_split(train, max(classes, images // 10), seed=seed)
    return Domain(train=train, validation=validation, test=test)


def _read_folder(folder: Path) -> DatasetDict:
    # Only folders of exactly these names are splits. The builder's own rule would match any name that contains `test`.
    names = [name for name in ("train", *_VALIDATION_NAMES, "test") if (folder / name).is_dir()]
    has_splits = "train" in names and all(child.name in names for child in folder.iterdir() if child.is_dir())
    files = {name: f"{name}/**" for name in names} if has_splits else {"train": "**"}
    try:
        splits = load_dataset("imagefolder", data_dir=str(folder.resolve()), data_files=files, drop_labels=False)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"the folder {str(folder)!r} holds no images: expected one subfolder for each class"
        ) from error
    for split in splits.values():
        for image in split.cast_column("image", Image(decode=False))["image"]:
            # `verify` reads the structure of a file without decoding it, so that a folder of photographs takes seconds.
            # Damaged pixels are found by the loader, which names the file.
            try:
                with PillowImage.open(image["path"]) as file:
                    file.verify()
            except (OSError, SyntaxError) as error:
                path = image["path"]
                raise ValueError(f"cannot read the image file {path!r}: {error}; replace or remove it") from error
    return splits


def _read_from_hub(name: str, subset: str | None, filters: Sequence[Filter]) -> DatasetDict:
    # The number of rows is not verified, because the dataset card states the number before filtering.
    options = {"filters": [tuple(part) for part in filters], "verification_mode": "no_checks"} if filters else {}
    try:
        return load_dataset(name, subset, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"cannot load the data {name!r}: expected 'digits', 'shapes', a folder that exists, or a Hugging Face "
            f"dataset{f' with rows that pass the filters {filters}' if filters else ''}. Cause: "
            f"{error.__cause__ or error}"
        ) from error


def _choose_column(name: str, features: Features, kind: str, wanted: str | None, found: list[str]) -> str:
    if wanted is not None and wanted in features:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    problem = f"has no column {wanted!r}" if wanted else f"has {len(found) or 'no'} columns that could be the {kind}"
    raise ValueError(f"{name!r} {problem}: set {kind}_column to one of {', '.join(found or features)}")


def _with_class_names(splits: DatasetDict) -> DatasetDict:
    """Convert labels that are numbers or strings to `ClassLabel`, with the same classes in every split."""
    if isinstance(next(iter(splits.values())).features["label"], ClassLabel):
        return splits
    names = [str(value) for value in sorted({value for split in splits.values() for value in split.unique("label")})]
    return splits.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))
