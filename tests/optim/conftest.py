"""galore-torch, written by the authors of the paper, as the reference."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def galore_torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Import its optimizers and projector without its `__init__`, which imports bitsandbytes (125 MB)."""
    package = ModuleType("galore_torch")
    package.__path__ = find_spec("galore_torch").submodule_search_locations
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    return SimpleNamespace(
        AdamW=import_module("galore_torch.adamw").AdamW,
        Adafactor=import_module("galore_torch.adafactor").Adafactor,
        Projector=import_module("galore_torch.galore_projector").GaLoreProjector,
    )
