"""Fixtures for short runs of train.py that share one source model."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train
from peft_edge.data import embedded
from peft_edge.records import Record
from tests.training.support import RunTraining, record_of

SHORT = [
    "backbone.name=test_efficientnet",
    "data.name=digits",
    "data.shift=blend",
    "data.image_size=32",
    "data.adaptation_size=64",
    "source.epochs=1",
    "training.epochs=2",
    "training.warmup_steps=1",
    "training.learning_rate=1e-2",
    "training.checkpoint_every_steps=1",
    "trackers=[]",
    "norm=stats",
    "lean.enabled=false",
    "profiling.every_n_steps=0",
    "--cpu",
]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer images of digits, because evaluation takes most of the time of a short run."""
    monkeypatch.setattr(embedded, "DIGITS_SPLIT_SIZES", {"adaptation": 100, "validation": 30, "test": 60})


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def arguments(cache: Path) -> list[str]:
    return [*SHORT, f"cache_dir={cache}"]


@pytest.fixture
def run(arguments: list[str]) -> RunTraining:
    """Return a function that runs train.py in this process and returns the record."""

    def run(output_dir: Path, *overrides: str) -> Record:
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main([*arguments, f"output_dir={output_dir}", *overrides])
        return record_of(output_dir)

    return run
