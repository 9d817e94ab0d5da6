"""Find the images, classes and splits in a folder, and warn about files that were left out."""

from __future__ import annotations

import hashlib
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets

from peft_edge.data.pixels import HEIC_REMEDY, check_image, identify, is_heic, is_image_suffix
from peft_edge.names import SPLIT_WORDS, split_of

logger = logging.getLogger(__name__)

Filter = Sequence[str | int | float | list[str]]
"""A condition: a column name, an operator and a value. With the operators `in` and `not in`, the value is a list."""

_OPERATORS: dict[str, Callable[[str, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda name, names: name in names,
    "not in": lambda name, names: name not in names,
}
# Folders that operating systems and tools create. They are left out, because they are not classes.
_SYSTEM_NAMES = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")


@dataclass
class _Found:
    """The images that were found in `folder`, and counts of the files and folders that were left out.

    `images` is a dict from split to a list of (path, class name). `left_out` counts the left-out files and folders for
    each reason, and `first` has the first path for each reason. A reason is a phrase in the singular, such as `hidden
    file`. The method `summary` forms the plural.
    """

    folder: Path
    images: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, Path] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path, count: int = 1) -> None:
        self.left_out[reason] += count
        self.first.setdefault(reason, path.relative_to(self.folder))

    def summary(self) -> str:
        parts = []
        for reason, count in sorted(self.left_out.items()):
            first = self.first[reason]
            plural = re.sub(r"\b(file|folder|link|image)\b", r"\1s", reason, count=1)
            parts.append(f"1 {reason} ({first})" if count == 1 else f"{count} {plural} (first {first})")
        return "; ".join(parts)


def read_image_folder(folder: Path) -> DatasetDict:
    """Read a folder with one subfolder for each class, or with such subfolders inside `train`, `validation` and `test`.

    Each split has the columns `image`, `label` and `content`. `content` is the `content_hash` of the image file.
    `check_image` checks every image file. Images in deeper subfolders of a class folder belong to this class. Without
    split folders, all images belong to the split `train`. A warning states how many files and folders were left out,
    and why.

    Raises:
        ValueError: If there are no training images, if an image is outside of the class folders, if an image file is
            damaged, or if it is unclear which folders are splits. The message names the file or folder at fault.
    """
    found = _Found(folder)
    roots = _split_folders(folder, found)
    for split, root in roots.items():
        found.images[split] = list(_class_images(root, found))
    names = sorted({name for images in found.images.values() for _, name in images})
    if not found.images.get("train"):
        hint = f" Left out: {found.summary()}." if found.left_out else ""
        raise ValueError(f"the folder {str(folder)!r} holds no images: expected one subfolder for each class.{hint}")
    if found.left_out:
        reads = "" if roots["train"] == folder else f"reads {', '.join(f'{root.name}/' for root in roots.values())}; "
        logger.warning("%s: %sleft out %s", folder, reads, found.summary())
    features = Features({"image": Image(), "label": ClassLabel(names=names), "content": Value("string")})
    splits = DatasetDict()
    for split, images in found.images.items():
        if images:
            table = {
                "image": [str(path) for path, _ in images],
                "label": [names.index(name) for _, name in images],
                "content": [_checked_hash(path) for path, _ in images],
            }
            splits[split] = Dataset.from_dict(table, features)
    _warn_untrained(folder, names, found)
    _warn_contradictions(folder, splits, found)
    return splits


def class_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the existing folders of the classes `names`, both in `folder` and in its split folders such as `train`.

    The result includes class folders without images.
    """
    folder = folder.expanduser()
    children = [path for path in _entries(folder) if path.is_dir()] if folder.is_dir() else []
    roots = [folder, *(child for child in children if split_of(child.name))]
    return [root / name for name in names for root in roots if (root / name).is_dir()]


def choose_domains(folder: Path, filters: Sequence[Filter]) -> list[str]:
    """Return the names of those subfolders of `folder` that meet all conditions in `filters`.

    A condition is a tuple such as `("domain", "==", "sketch")`, where `domain` is the name of the subfolder.

    Raises:
        ValueError: If a condition is invalid, or no subfolder meets all conditions.
    """
    names = [path.name for path in _entries(folder) if path.is_dir() and not _is_hidden(path)]
    chosen = names
    for condition in filters:
        if len(condition) != 3 or condition[0] != "domain" or condition[1] not in _OPERATORS:
            raise ValueError(
                f"{folder}: expected conditions [domain, OPERATOR, NAME] with an operator of {', '.join(_OPERATORS)}, "
                f"because the only column of a folder is domain, the name of the subfolder; found {condition}"
            )
        chosen = [name for name in chosen if _OPERATORS[str(condition[1])](name, condition[2])]
    if not chosen:
        raise ValueError(f"{folder}: none of the subfolders {', '.join(names) or '(none)'} meets {list(filters)}")
    return chosen


def domain_label(name: str, filters: Sequence[Filter]) -> str:
    """Return the name of a dataset, followed by the conditions on its rows. Columns and the operator `==` are omitted.

    >>> domain_label("flwrlabs/pacs", [("domain", "==", "photo")])
    'flwrlabs/pacs (photo)'
    >>> domain_label("PACS", [("domain", "!=", "photo"), ("domain", "in", ["sketch", "cartoon"])])
    'PACS (!= photo, in sketch cartoon)'
    """
    values = []
    for _, comparison, value in filters:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        values.append(text if comparison == "==" else f"{comparison} {text}")
    return f"{name} ({', '.join(values)})" if values else name


def read_domain_folders(folder: Path, filters: Sequence[Filter]) -> DatasetDict:
    """Call `read_image_folder` for each subfolder that `choose_domains` returns, and concatenate the splits.

    If only some of these subfolders have a split such as `test`, a warning names the subfolders without this split.

    Raises:
        ValueError: If `choose_domains` or `read_image_folder` raises a ValueError, or if two subfolders have different
            classes.
    """
    parts = {name: read_image_folder(folder / name) for name in choose_domains(folder, filters)}
    (first, classes), *others = ((name, part["train"].features["label"].names) for name, part in parts.items())
    for name, found in others:
        if found != classes:
            raise ValueError(
                f"{folder}: expected the same classes in all domains, found {', '.join(sorted({*found} ^ {*classes}))} "
                f"in only one of {first}/ and {name}/"
            )
    splits = {split: [part[split] for part in parts.values() if split in part] for split in SPLIT_WORDS}
    missing = [
        f"no {split} split in {', '.join(name for name, part in parts.items() if split not in part)}"
        for split, found in splits.items()
        if 0 < len(found) < len(parts)
    ]
    if missing:
        logger.warning(
            "%s: %s: the accuracy on a split includes only the domains that have it. Give all domains the same splits, "
            "or none",
            folder,
            "; ".join(missing),
        )
    return DatasetDict({split: concatenate_datasets(found) for split, found in splits.items() if found})


def content_hash(content: bytes) -> str:
    """Return a hash of `content`, the bytes of a file. Names and times of the file do not change the hash."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _checked_hash(path: Path) -> str:
    try:
        content = path.read_bytes()
        check_image(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image file {str(path)!r}: {error}; replace or remove it") from error
    return content_hash(content)


def _warn_untrained(folder: Path, names: list[str], found: _Found) -> None:
    trained = {name for _, name in found.images["train"]}
    for name in names:
        if name not in trained:
            counts = {
                split: sum(label == name for _, label in images)
                for split, images in found.images.items()
                if split != "train"
            }
            places = " and ".join(f"{count} in {split}" for split, count in counts.items() if count)
            logger.warning(
                "%s: the class %r has no image in train, and %s: the model cannot learn it, and these images count as "
                "errors",
                folder,
                name,
                places,
            )


def _warn_contradictions(folder: Path, splits: DatasetDict, found: _Found) -> None:
    """Warn if copies of one image file are in the folders of several classes."""
    places: dict[str, dict[str, Path]] = {}
    for key, split in splits.items():
        for (path, name), content in zip(found.images[key], split["content"][:], strict=True):
            places.setdefault(content, {}).setdefault(name, path)
    contradictions = [classes for classes in places.values() if len(classes) > 1]
    if contradictions:
        first = " and ".join(str(path) for path in contradictions[0].values())
        logger.warning(
            "%s: %d image files are in several classes: at most one of the labels is right. The first: %s",
            folder,
            len(contradictions),
            first,
        )


def _split_folders(folder: Path, found: _Found) -> dict[str, Path]:
    """Return a dict from the name of each split to its folder, or `{"train": folder}` if there are no split folders."""
    children = [child for child in _entries(folder) if child.is_dir() and not _is_hidden(child)]
    splits: dict[str, list[Path]] = {}
    for child in children:
        if split := split_of(child.name):
            splits.setdefault(split, []).append(child)
    # A class may be called "train". The folder of a class contains images, whereas a split folder contains folders.
    nested = {split: [path for path in paths if _has_class_folders(path)] for split, paths in splits.items()}
    nested = {split: paths for split, paths in nested.items() if paths}
    if not nested:
        if "train" in splits and len(splits) > 1 and all(split_of(child.name) for child in children):
            raise ValueError(
                f"{splits['train'][0]} holds images and no class folders: expected one subfolder for each class in "
                "every split"
            )
        _check_no_hidden_splits(folder, children)
        return {"train": folder}
    if "train" not in nested:
        raise ValueError(
            f"{folder} has {' and '.join(str(paths[0].name) + '/' for paths in nested.values())} with class folders, "
            "and no train/: rename the folder of the training images to train"
        )
    for split, paths in nested.items():
        if len(paths) > 1:
            raise ValueError(
                f"{folder} has several folders for {split}: {', '.join(path.name for path in paths)}. Keep one of "
                "them, or rename the others"
            )
    chosen = {split: nested[split][0] for split in SPLIT_WORDS if split in nested}
    others = [child for child in children if child not in chosen.values()]
    if len(chosen) == 1 and others:
        raise ValueError(
            f"{folder} contains {others[0].name}/ and {chosen['train'].name}/, which contains folders. If "
            f"{chosen['train'].name} is a class, rename its folder; if it is the training split, move "
            f"{others[0].name}/ to another place"
        )
    for child in _visible(folder, found):
        if child not in chosen.values():
            found.leave_out(f"{'folder' if child.is_dir() else 'file'} next to the splits", child)
    return chosen


def _check_no_hidden_splits(folder: Path, children: list[Path]) -> None:
    """Raise a `ValueError` if there are folders such as `data_train` and `data_test`, which may be splits or classes.

    Without the error, they would be read as classes.
    """
    found: dict[str, Path] = {}
    for child in children:
        if _has_class_folders(child):
            for word in re.split(r"[\W\d_]+", child.name):
                if split := split_of(word):
                    found.setdefault(split, child)
    if "train" in found and len(found) > 1:
        names = {split: path.name for split, path in found.items()}
        raise ValueError(
            f"{folder}: expected classes, or splits with the names train, validation and test; "
            f"{' and '.join(names.values())} contain folders and could be either. If they are splits, rename them to "
            f"{' and '.join(names)}; if they are classes, move their images out of the inner folders"
        )


def _has_class_folders(folder: Path) -> bool:
    return any(path.is_dir() and not _is_hidden(path) for path in folder.iterdir())


def _class_images(root: Path, found: _Found) -> Iterator[tuple[Path, str]]:
    """Yield (path, class name) for each image in the class folders of `root`, in alphabetical order."""
    for child in _visible(root, found):
        if child.is_dir():
            inner = {split_of(path.name) for path in child.iterdir() if path.is_dir()} - {None}
            if "train" in inner and len(inner) > 1:
                raise ValueError(
                    f"{child} contains the split folders {' and '.join(sorted(filter(None, inner)))}: expected split "
                    f"folders that contain class folders, as in train/cat and test/cat. If {child} is the data set, "
                    "pass its path"
                )
            before = found.left_out.total()
            # Do not follow links to the folders above this class, which contain images of other classes.
            above = {child.resolve(), *child.resolve().parents, root.resolve()}
            images = [path for path in _files(child, found, above) if _is_image(path, found)]
            if not images and found.left_out.total() == before:
                found.leave_out("empty folder", child)
            yield from ((path.absolute(), child.name) for path in images)
        elif _is_image(child, found):
            raise ValueError(
                f"the image {child} is outside of the class folders: move it into the subfolder of its class, or "
                "remove it"
            )


def _files(folder: Path, found: _Found, visited: set[Path]) -> Iterator[Path]:
    for path in _visible(folder, found):
        if not path.is_dir():
            yield path
        elif (real := path.resolve()) in visited:
            found.leave_out("link to a folder above it", path)
        else:
            yield from _files(path, found, visited | {real})


def _visible(folder: Path, found: _Found) -> list[Path]:
    visible = []
    for path in _entries(folder):
        if _is_hidden(path):
            found.leave_out(f"hidden {'folder' if path.is_dir() else 'file'}", path)
        elif not path.exists():
            found.leave_out("broken link", path)
        elif any("\ud800" <= letter <= "\udfff" for letter in str(path.absolute())):
            # Python keeps bytes of a name that are not UTF-8 as surrogates.
            raise ValueError(f"the path {str(path)!r} is not valid UTF-8: rename it")
        else:
            visible.append(path)
    return visible


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.name)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _SYSTEM_NAMES


def _is_image(path: Path, found: _Found) -> bool:
    """Return whether `path` is a file with the suffix or content of an image. If not, count it in `found.left_out`."""
    if not path.is_file():
        found.leave_out("special file", path)
        return False
    if is_image_suffix(path.suffix):
        return True
    with path.open("rb") as file:
        if identify(file) is not None:
            return True
        file.seek(0)
        if is_heic(file.read(12)):
            found.leave_out(f"HEIC image ({HEIC_REMEDY})", path)
            return False
    kind = f"{path.suffix} file" if path.suffix else "file without an ending"
    found.leave_out(f"{kind} that Pillow cannot read as an image", path)
    return False
