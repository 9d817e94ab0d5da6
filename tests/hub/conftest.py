"""A local stand-in for the Hub, and a model to push to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_edge.backbones import load_backbone, save_backbone, set_class_names
from tests.hub import stand_in
from tests.hub.support import adapted


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[stand_in.StandIn]:
    """Run a local stand-in for the Hub."""
    with stand_in.reachable(tmp_path / "hf_home") as server:
        yield server


@pytest.fixture
def small_model(tmp_path: Path) -> PeftModel:
    """Return an adapted network of 0.36 M parameters, whose backbone was loaded from a local folder."""
    base = load_backbone("test_efficientnet", num_classes=3)
    set_class_names(base, ["owl", "été", "9"])
    save_backbone(base, tmp_path / "base")
    return adapted(load_backbone(str(tmp_path / "base")))


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(2, 3, 32, 32)
