from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from peft_edge.cli import main
from peft_edge.records import add_record, read_archive
from peft_edge.report import write_report


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "results" not in path.parts
    }


@pytest.fixture(scope="module")
def written(reports: Path) -> Path:
    """The folder with its report, written beside another file."""
    (reports / "other.txt").write_text("mine", encoding="utf-8")
    write_report(reports / "results", reports)
    return reports


def test_what_the_page_refers_to_exists(written: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)]*)\)|^\[\d+\]: (.*)$", text, re.MULTILINE)
    targets = {place or record for place, record in found if not place.startswith("http")}
    assert {"data.csv", "figures/flops.png", "figures/flops.svg"} < targets
    assert [target for target in targets if not (written / target).is_file()] == []
    assert "\npeft-edge report --records reports/results --out reports\n" in text


def test_what_lies_there_besides_stays(written: Path) -> None:
    assert (written / "other.txt").read_text(encoding="utf-8") == "mine"
    assert not [name for name in contents(written) if "unfinished" in name]


def test_the_same_records_elsewhere_are_the_same_bytes(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "reports"
    shutil.copytree(written / "results", elsewhere / "results")
    main(["report", "--records", str(elsewhere / "results"), "--out", str(elsewhere)])
    printed = {Path(line).relative_to(elsewhere).as_posix() for line in capsys.readouterr().out.splitlines()}
    found = contents(elsewhere)
    assert printed == set(found)
    assert found == {name: content for name, content in contents(written).items() if name != "other.txt"}


def test_a_changed_record_changes_what_is_made_of_it_and_nothing_else(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "results", tmp_path / "reports" / "results")
    name, record = next(iter(read_archive(written / "results").runs.items()))
    record.train_info.metrics[-1]["test accuracy"] += 0.05
    add_record(tmp_path / "reports" / "results", name.removesuffix(".json"), record)
    write_report(tmp_path / "reports" / "results", tmp_path / "reports")
    before, after = contents(written), contents(tmp_path / "reports")
    changed = {name for name in after if after[name] != before[name]}
    figures = {
        f"figures/{name}.{ending}"
        for name in ("score_over_rank", "forgetting", "tradeoff_1")
        for ending in ("png", "svg")
    }
    assert changed == {"README.md", "data.csv", *figures}


def test_without_matplotlib_nothing_is_written(reports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "peft-edge\[figures\]"'):
        write_report(reports / "results", tmp_path / "reports")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_records_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--records", str(tmp_path), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no record" in capsys.readouterr().err
