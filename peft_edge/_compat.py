"""Private interfaces of torch, PEFT and timm that this package uses, in one place.

Each entry says why the public interface is not enough and with which version it was last seen. `tests/test_compat.py`
has a test for each, which fails when an upgrade removes or changes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------


# --- the rest: data, training, hub, export, study ---------------------------------------------------------------------


def dataset_fingerprint(dataset: Dataset) -> str:
    """Return the hash that `datasets` keeps of a dataset's rows and transforms.

    `datasets` documents fingerprints and its cache relies on them, but has no public attribute for them.
    Seen in datasets 5.2.0.
    """
    return dataset._fingerprint
