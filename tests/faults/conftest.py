"""Fixtures for the tests of faults: the cache of source models, and an undisturbed run for comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.small_run import completed, digest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('sources')}"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: str) -> str:
    """Return the digest of the adapter after a run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    completed(folder, cache)
    return digest(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
