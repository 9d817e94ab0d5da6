"""Check names that users type, and suggest the nearest valid name. This module does not import torch.

This module repeats the names of the embedded benchmarks and of the corruptions, because the modules of `peft_edge.data`
that define them import torch. A test compares the names here with `EMBEDDED` and `SHIFTS` there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

DATA_NAMES = ("digits", "shapes")
SHIFT_NAMES = (
    *("blend", "brightness", "contrast", "defocus_blur", "elastic", "fog", "gaussian_blur", "gaussian_noise"),
    *("grayscale", "impulse_noise", "invert", "jpeg", "motion_blur", "pixelate", "rotation", "shot_noise", "snow"),
)
# If a folder is missing, another folder in the same place often has a slightly similar name by chance. The cutoff for
# folder names is therefore higher than the default of `nearest_name`.
_FOLDER_CUTOFF = 0.75
_OTHER_DATA = "a folder that exists, or a Hugging Face dataset with its owner, such as uoft-cs/cifar10"
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing",
}
"""A dict from each split to a regular expression. The expression matches the words that a folder name may use for the
split."""


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the name in `known` that is most similar to `name`, or None if no name is similar.

    Two names are similar if their `difflib.SequenceMatcher.ratio` is at least `cutoff`. Upper and lower case count as
    equal.

    >>> [nearest_name(name, ["lora", "dora", "full"]) for name in ("LoRA", "ful", "tflite")]
    ['lora', 'full', None]
    """
    by_lower_case = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: a question with the most similar name, or "" if no name is similar.

    >>> did_you_mean("lorra", ["lora", "full"]), did_you_mean("fox", ["cat", "dog"])
    ('; did you mean lora?', '')
    """
    nearest = nearest_name(name, known)
    return "" if nearest is None else f"; did you mean {nearest}?"


def nearest_folder(path: Path, *, cutoff: float = 0.6) -> Path | None:
    """Return the existing folder that the user probably meant by `path`, or None if no folder is similar.

    The function assumes that one part of `path` is misspelled: the first part that does not exist. The candidates are
    the folders in the same place that contain the rest of `path`. The candidate with the most similar name replaces the
    misspelled part. `cutoff` is passed to `nearest_name`.
    """
    for part in (path, *path.parents):
        if part.parent.is_dir():
            rest = path.relative_to(part)
            names = [entry.name for entry in part.parent.iterdir() if (entry / rest).is_dir()]
            nearest = nearest_name(part.name, names, cutoff=cutoff)
            return None if nearest is None else part.parent / nearest / rest
    return None


def split_of(name: str) -> str | None:
    """Return the split that a folder name stands for (`train`, `validation` or `test`), or None if it names no split.

    >>> [split_of(name) for name in ("Train", "training_set", "val", "TEST", "train station")]
    ['train', 'train', 'validation', 'test', None]
    """
    for split, words in SPLIT_WORDS.items():
        if re.fullmatch(rf"({words})([ _-]?(set|split|data|images?))?", name.lower()):
            return split
    return None


def problem_of_data(name: str) -> str | None:
    """Return an error message if `name` cannot be the name of data, otherwise None.

    Data are one of the following: an embedded benchmark (such as `digits`), an existing folder, or a dataset on the
    Hub. For a dataset on the Hub, the function checks only the form of the id. It sends no request to the Hub, because
    without network a request takes half a minute to fail.

    >>> [problem_of_data(name) for name in ("digits", "uoft-cs/cifar10")]
    [None, None]
    >>> problem_of_data("path/to/photos")
    "unknown data 'path/to/photos': there is no such folder"
    """
    if name in DATA_NAMES or Path(name).expanduser().is_dir() or may_be_on_hub(name):
        return None
    return f"unknown data {name!r}: {_problem(name, DATA_NAMES, ', '.join([*DATA_NAMES, _OTHER_DATA]))}"


def problem_of_shift(shift: str, data: str) -> str | None:
    """Return an error message if `shift` cannot be a shift of `data`, otherwise None.

    A shift is one of the following: a corruption (such as `fog`), a split of `data`, an existing folder, or a dataset
    on the Hub. The function sends no request to the Hub.

    >>> problem_of_shift("blend", "digits"), problem_of_shift("night/photos", "digits")
    (None, None)
    >>> problem_of_shift("invret", "digits").partition("?")[0]
    "unknown shift 'invret': did you mean 'invert'"
    """
    if shift in SHIFT_NAMES or Path(shift).expanduser().is_dir() or may_be_on_hub(shift):
        return None
    splits: dict[str, str] = {} if data in DATA_NAMES else SPLIT_WORDS
    if splits and not _is_path(shift):
        # A dataset on the Hub may have splits of any name, such as "noise". `shift` therefore counts as a misspelled
        # corruption only if it is very similar to the name of a corruption.
        is_on_hub = not Path(data).expanduser().is_dir()
        if split_of(shift) or (is_on_hub and nearest_name(shift, SHIFT_NAMES, cutoff=0.8) is None):
            return None
    expected = [*SHIFT_NAMES, *(["a split of the data"] if splits else []), _OTHER_DATA]
    return f"unknown shift {shift!r}: {_problem(shift, [*SHIFT_NAMES, *splits], ', '.join(expected))}"


def may_be_on_hub(name: str) -> bool:
    """Return whether `name` may be the id of a repository on the Hub, which has the form `owner/name`.

    If there is a folder `PACS`, the name `PACS/sketch` counts as a path inside this folder, and not as an id.
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).parent.is_dir()


def missing_folder(name: str) -> str:
    """Return an error message for the path `name`, which is not a folder. Suggest a similar folder, if there is one."""
    path = Path(name).expanduser()
    if path.exists():
        return "this is a file, expected a folder"
    nearest = nearest_folder(path, cutoff=_FOLDER_CUTOFF)
    return f"there is no such folder{f'; did you mean {str(nearest)!r}?' if nearest else ''}"


def _problem(name: str, known: Iterable[str], expected: str) -> str:
    if _is_path(name) or Path(name).exists():
        return missing_folder(name)
    nearest = nearest_name(name, known) or nearest_folder(Path(name), cutoff=_FOLDER_CUTOFF)
    return f"did you mean {str(nearest)!r}? Expected {expected}" if nearest else f"expected {expected}"


def _is_path(name: str) -> bool:
    return re.search(r"[/\\]", name) is not None or name.startswith((".", "~"))
