"""Read the splits of image folders and Hugging Face datasets, and build domains whose splits share no images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from peft_edge.data.domain import Domain, stratified_split
from peft_edge.data.folders import Filter, content_hash, read_domain_folders, read_image_folder

logger = logging.getLogger(__name__)

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
    """Read the labelled splits of a dataset, with the same classes in every split.

    Each split has the columns `image`, `label` and `content`. `content` is the `content_hash` of the image file. The
    fingerprint of a split depends only on `content`, `label` and the class names, not on the names of image files. A
    split that contains the label -1 is left out with a warning.

    Args:
        name: A folder with one subfolder for each class (inside `train`, `validation` and `test`, if they exist), or
            the name of a Hugging Face dataset.
        subset: The name of a configuration of a Hugging Face dataset.
        filters: Conditions (column, operator, value). Only rows that meet all conditions are read. Conditions require a
            Hugging Face dataset of Parquet files, or a folder with one subfolder for each domain. Each of these
            subfolders has one subfolder for each class. `choose_domains` describes the conditions on such a folder.
        image_column: The name of the image column; by default the only column of type `datasets.Image`.
        label_column: The name of the label column; by default the only column of type `datasets.ClassLabel` or, without
            such a column, the column `label` or `labels`.

    Raises:
        ValueError: If the data cannot be loaded, if a column is missing or ambiguous, if an image file of a folder is
            damaged, or if there is only one class.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        splits = read_domain_folders(folder, filters) if filters else read_image_folder(folder)
    else:
        splits = _read_from_hub(name, subset, filters)
    features = next(iter(splits.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [column for column in _LABEL_NAMES if column in features]
    columns = {
        _choose_column(name, features, "image", image_column, images): "image",
        _choose_column(name, features, "label", label_column, labels): "label",
    }
    contents = {key: split["content"][:] if folder.is_dir() else None for key, split in splits.items()}
    splits = _with_class_names(splits.select_columns(list(columns)).rename_columns(columns))
    class_names = next(iter(splits.values())).features["label"].names
    if len(class_names) < 2:
        inner = folder / class_names[0]
        is_wrapper = inner.is_dir() and any(path.is_dir() for path in inner.iterdir())
        raise ValueError(
            f"{name!r} has one class, {class_names[0]!r}; expected at least two. "
            "A folder needs one subfolder for each class, with that class's images inside"
            + (f"; if the classes are inside {inner}, pass that path instead" if is_wrapper else "")
        )
    # Many published test splits have the label -1 for every image.
    labelled = {key: split for key, split in splits.items() if min(split["label"][:]) >= 0}
    if left_out := sorted(splits.keys() - labelled.keys()):
        logger.warning("%s: left out the splits without labels: %s", name, ", ".join(left_out))
    return DatasetDict({key: _with_contents(split, contents[key]) for key, split in labelled.items()})


def _with_contents(split: Dataset, contents: list[str] | None) -> Dataset:
    """Return `split` with an added column `content`.

    The values of the column are `contents` or, if `contents` is None, the result of `file_hashes(split)`. The
    fingerprint of the result depends only on `content`, `label` and the class names.
    """
    contents = file_hashes(split) if contents is None else contents
    parts = json.dumps([split.features["label"].names, split["label"][:], contents])
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:32]
    return split.add_column("content", contents, new_fingerprint=fingerprint)


def file_hashes(split: Dataset) -> list[str]:
    """Return the `content_hash` of each image file in a split, in the order of the rows."""
    raw = split.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    hashes = []
    for batch in raw.iter(256):
        for image in batch["image"]:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            hashes.append(content_hash(content))
    return hashes


def domain_from_splits(
    name: str, splits: DatasetDict, *, train_split: str, seed: int, exclude: Collection[str] = ()
) -> Domain:
    """Build a domain from the splits of a dataset. A missing validation or test split is drawn from `train_split`.

    A missing test split gets a fifth of the images of `train_split`, and a missing validation split gets a tenth. Both
    get at least one image of each class, with one exception: if a class has only one image left after the test split is
    drawn, this image stays in the training split. A warning names the classes that are missing in the validation or
    test split.

    No image file is in two splits: copies of test images are removed from validation and training, and copies of
    validation images are removed from training. If a split must be drawn from `train_split`, all but the first copy of
    each image in `train_split` are removed first. Images whose `content` hash is in `exclude` are removed from all
    splits. A warning states how many images are removed. Messages refer to the dataset as `name`.

    Raises:
        ValueError: If `splits` has no split with the name `train_split`, if a split has no images after the removal of
            copies, or if there are too few images to draw a split.
    """
    if train_split not in splits:
        raise ValueError(f"{name!r} has no labelled split {train_split!r}: name one of {', '.join(splits)}")
    found = {
        "test": splits.get("test") if train_split != "test" else None,
        "validation": next((splits[key] for key in _VALIDATION_NAMES if key in splits and key != train_split), None),
        "train": splits[train_split],
    }
    is_divided = found["test"] is None or found["validation"] is None
    parts = _without_copies(name, found, set(exclude), is_divided=is_divided)
    train, validation, test = parts["train"], parts.get("validation"), parts.get("test")
    classes, images = len(train.features["label"].names), len(train)
    if test is None:
        train, test = stratified_split(train, max(classes, images // 5), seed=seed)
    if validation is None:
        train, validation = _draw_validation(train, max(classes, images // 10), seed=seed)
    domain = Domain(train=train, validation=validation, test=test)
    _warn_unmeasured(name, domain)
    return domain


def _draw_validation(train: Dataset, size: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """Draw validation images from `train`. Return (remaining images, drawn images).

    If a class has a single image, keep this image for training. `stratified_split` would raise an error instead.
    """
    labels = train["label"][:]
    counts = Counter(labels)
    single = [row for row, label in enumerate(labels) if counts[label] == 1]
    if not single or len(single) == len(train):
        return stratified_split(train, size, seed=seed)
    others = train.select([row for row, label in enumerate(labels) if counts[label] > 1])
    rest, validation = stratified_split(others, size - len(single), seed=seed)
    return concatenate_datasets([rest, train.select(single)]), validation


def _warn_unmeasured(name: str, domain: Domain) -> None:
    """Warn about classes that have training images but no validation or no test images.

    The accuracy on a split without images of a class does not show how well the model knows this class.
    """
    trained = set(domain.train["label"][:])
    for key, split in (("validation", domain.validation), ("test", domain.test)):
        if missing := sorted(trained.difference(split["label"][:])):
            logger.warning(
                "%s: the %s split has no image of %s: its accuracy does not include these classes",
                name,
                key,
                ", ".join(domain.class_names[label] for label in missing),
            )


def _without_copies(
    name: str, splits: dict[str, Dataset | None], exclude: set[str], *, is_divided: bool
) -> dict[str, Dataset]:
    """Return the splits without those images whose `content` is in `exclude` or in an earlier split of the dict.

    If `is_divided`, also remove all but the first copy of each image in the split `train`. Leave out splits that are
    None. A warning, which refers to the dataset as `name`, states how many images are removed.
    """
    kept, removed = {}, []
    for key, split in splits.items():
        if split is None:
            continue
        rows, seen = [], set(exclude)
        contents = split["content"][:]
        for row, content in enumerate(contents):
            if content not in seen:
                rows.append(row)
            if key == "train" and is_divided:
                seen.add(content)
        if len(rows) < len(split):
            removed.append(f"{len(split) - len(rows)} of {len(split)} from {key}")
            if not rows:
                raise ValueError(
                    f"{name!r} has no image for {key} that is not a copy of an image of another split or of the "
                    "source: expected images of its own"
                )
            split = split.select(rows)
        kept[key] = split
        exclude = exclude | set(contents)
    if removed:
        logger.warning(
            "%s: left out images whose files are copies of images of another split, of the source or of the same "
            "split: %s",
            name,
            ", ".join(removed),
        )
    return kept


def _read_from_hub(name: str, subset: str | None, filters: Sequence[Filter]) -> DatasetDict:
    # With filters, do not verify the number of rows, because the dataset card states the number without filters.
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
    """Return `splits` with a label column of type `ClassLabel`.

    If the labels are plain numbers or strings, their sorted values become the class names.
    """
    if isinstance(next(iter(splits.values())).features["label"], ClassLabel):
        return splits
    names = [str(value) for value in sorted({value for split in splits.values() for value in split.unique("label")})]
    return splits.cast_column("label", Value("string")).cast_column("label", ClassLabel(names=names))
