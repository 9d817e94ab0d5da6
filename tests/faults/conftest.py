"""The shared cache of source models, and the undisturbed run to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.small_run import completed, digest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('sources')}"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: str) -> str:
    """The digest of the adapter of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    completed(folder, cache)
    return digest(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
