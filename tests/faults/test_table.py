from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import table

REPORTS = Path(__file__).parents[2] / "reports" / "faults"


def test_the_committed_page_is_made_from_its_records() -> None:
    assert (REPORTS / "README.md").read_text(encoding="utf-8") == table.page(table.read(REPORTS))


def test_a_fault_adds_a_record_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = table.Fault("kill -9, twice", "ends", 0.04, None, "nothing")
    monkeypatch.setenv(table.FOLDER, str(tmp_path))
    table.add(fault)
    assert {file.name for file in tmp_path.iterdir()} == {"kill-9-twice.json", "README.md"}
    assert table.read(tmp_path) == [fault]
    assert "| kill -9, twice | ends | 0.0 | - | nothing |" in (tmp_path / "README.md").read_text()


def test_nothing_is_written_without_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(table.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    table.add(table.Fault("a", "b", None, None, "c"))
    assert list(tmp_path.iterdir()) == []
