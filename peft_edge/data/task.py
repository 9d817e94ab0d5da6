"""What a run adapts to: a source domain, one or more target domains, and what changed between them."""

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
    def class_names(self) -> list[str]:
        """The names of the labels 0, 1, ...; a split need not hold images of all of them."""
        return self.train.features["label"].names

    @property
    def num_classes(self) -> int:
        """The number of classes that a model for this domain tells apart."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Changes when an image, a label, a split or the shift of this domain changes; a key for caching a model."""
        # `datasets` documents this attribute, yet offers no public name for it.
        return combined_fingerprint(*(split._fingerprint for split in (self.train, self.validation, self.test)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem that changes between training and use: its images shift, or classes are added."""

    name: str
    """What was asked of `load_task`: a benchmark, a Hugging Face dataset or a folder."""

    change: str
    """What makes the targets differ from the source, in words."""

    source: Domain
    """Where the model comes from."""

    targets: tuple[Domain, ...]
    """Where it must work: one domain for a shift, one for each increment of new classes, in their order."""

    @property
    def class_names(self) -> list[str]:
        """The names of the labels 0, 1, ... in the end; those of the source, and then the new ones."""
        return self.targets[-1].class_names

    @property
    def num_classes(self) -> int:
        """The number of classes in the end."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Changes when any domain does."""
        return combined_fingerprint(self.source.fingerprint, *(target.fingerprint for target in self.targets))
