"""What a run adapts to: a source domain, a target domain, and what shifted between them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from datasets import Dataset


def combined_fingerprint(*parts: str) -> str:
    """Returns 16 hexadecimal digits that change when any part, or the order of the parts, changes."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Three splits of labelled images from one distribution.

    Each split is a Hugging Face dataset with the columns `image` (`datasets.Image`) and `label`
    (`datasets.ClassLabel`).
    """

    train: Dataset
    """Images a model is trained on; for a target domain, the few it is adapted with."""

    validation: Dataset
    """Images that choose a learning rate or an epoch, never reported."""

    test: Dataset
    """Images that are only reported."""

    @property
    def fingerprint(self) -> str:
        """Changes when an image, a label, a split or the shift of this domain changes; a key for caching a model."""
        # `datasets` documents this attribute, yet offers no public name for it.
        return combined_fingerprint(*(split._fingerprint for split in (self.train, self.validation, self.test)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem whose images shift between training and use."""

    name: str
    """What was asked of `load_task`: a benchmark, a Hugging Face dataset or a folder."""

    shift: str
    """The name of the corruption, or of the data set, that makes the target differ from the source."""

    class_names: list[str]
    """The names of the labels 0, 1, ..., shared by both domains."""

    source: Domain
    """Where the model comes from."""

    target: Domain
    """Where it must work; `validation` and `test` are the source's images, shifted, unless the target has its own."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Changes when either domain does."""
        return combined_fingerprint(self.source.fingerprint, self.target.fingerprint)
