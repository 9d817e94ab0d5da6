"""A fixture with galore-torch, the implementation by the authors of the GaLore paper, for comparison."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def galore_torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the optimizers and the projector of galore-torch.

    The fixture does not run the package's `__init__`, which would import bitsandbytes (125 MB).
    """
    package = ModuleType("galore_torch")
    package.__path__ = find_spec("galore_torch").submodule_search_locations
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    return SimpleNamespace(
        AdamW=import_module("galore_torch.adamw").AdamW,
        Adafactor=import_module("galore_torch.adafactor").Adafactor,
        Projector=import_module("galore_torch.galore_projector").GaLoreProjector,
    )
