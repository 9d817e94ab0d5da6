from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_edge.bench.results import BenchRecord
from peft_edge.cli import main
from peft_edge.records import Archive, CostRecord, Record, add_record, read_archive
from peft_edge.report import write_report
from peft_edge.report.page import make_report

RESULT = r"^\*\*Result: (Agreed|In part|Not agreed|Not measured)\.\*\*"


def page_of(archive: Archive, **measured: BenchRecord) -> str:
    return make_report(archive, "results", measured, "the command")[0]["README.md"]


def test_every_record_is_in_a_table_and_every_row_names_its_records(archive: Archive) -> None:
    _, tables, _ = make_report(archive, "results", {}, "the command")
    assert list(tables) == ["memory", "arithmetic", "accuracy", "updates", "choice"]
    found = set()
    for table in tables.values():
        for column in {"record", "full_record", "records"} & set(table):
            assert table[column].str.startswith("results/").all()
            found |= set(" ".join(table[column]).split())
    assert found == {f"results/{name}" for name in archive.runs | archive.costs}


def test_findings_have_the_verdict_of_every_claim(archive: Archive) -> None:
    text = page_of(archive)
    findings = text.split("## Findings")[1].split("\n## ")[0]
    verdicts = re.findall(r"^- \*\*.*\.\*\* \*(.*)\*: ", findings, re.MULTILINE)
    assert verdicts == ["In part", "Not agreed", "Agreed", "Agreed", "Agreed"]
    assert re.findall(RESULT, text, re.MULTILINE) == verdicts
    assert text.count("**The verdict**") == 5


def test_page_warns_of_networks_trained_from_scratch(archive: Archive) -> None:
    assert "come from toys**: small benchmarks" in page_of(archive)
    assert "(digits, 48 px)" in page_of(archive)
    for run in archive.runs.values():
        run.run_info.train_config["backbone"]["pretrained"] = True
    assert "toys" not in page_of(archive)
    assert "trained from random weights" not in page_of(archive)


@pytest.mark.parametrize(
    ("message", "reason"),
    [("Traceback\nValueError: it broke", "ValueError: it broke"), ("a|b", r"a\|b"), ("", "no reason given")],
)
def test_failed_runs_are_listed_with_their_reason(
    archive: Archive, run: Callable[..., Record], message: str, reason: str
) -> None:
    archive.runs["broken.json"] = run(status="diverged", seed=7)
    archive.runs["broken.json"].run_info.error_msg = message
    text = page_of(archive).split("## Runs that did not succeed")[1]
    row = f"| lora | mobile_net | 7 | diverged | {reason} | [broken](results/broken.json) |"
    assert row in text.splitlines()


def test_analyses_without_full_fine_tuning_are_listed(archive: Archive, cost: Callable[..., CostRecord]) -> None:
    archive.costs["alone.json"] = cost("lora", batch_size=99)
    assert "no full fine-tuning to compare with: [alone](results/alone.json)." in page_of(archive)


@pytest.mark.parametrize("kind", ["runs", "costs"])
def test_missing_kind_of_record_is_told_and_the_rest_is_complete(archive: Archive, kind: str) -> None:
    getattr(archive, kind).clear()
    verdicts = re.findall(RESULT, page_of(archive), re.MULTILINE)
    assert len(verdicts) == 5
    assert verdicts.count("Not measured") == {"runs": 3, "costs": 2}[kind]


def test_single_run_makes_a_page(run: Callable[..., Record]) -> None:
    assert len(re.findall(RESULT, page_of(Archive(runs={"a.json": run("lora")})), re.MULTILINE)) == 5


def test_measured_times_are_shown(archive: Archive, bench: BenchRecord) -> None:
    text = page_of(archive, **{"bench/net.json": bench}).split("## Time and memory of a step, measured")[1]
    assert "on a processor with 1 thread." in text
    assert "| our LoRA | 0.52 (3) |" in text
    assert "- net, another package: it is not installed" in text.splitlines()
    assert "Time and memory of a step, measured" not in page_of(archive)


def test_errors_of_methods_that_are_only_in_the_csv_file_are_not_shown(archive: Archive, bench: BenchRecord) -> None:
    bench.rows[2].label = "plain inference"
    assert "it is not installed" not in page_of(archive, **{"bench/net.json": bench})


def test_machines_and_versions_are_counted(archive: Archive) -> None:
    archive.runs[next(iter(archive.runs))].meta_info.package_info = {"torch-version": "3.0.0"}
    lines = page_of(archive).splitlines()
    runs, records = len(archive.runs), len(archive.runs) + len(archive.costs)
    assert f"- {runs} runs on Linux, x86_64, a processor, accelerator cpu, 1 CPU thread per process" in lines
    assert f"- {records - 1} records with torch 2.0.0" in lines
    assert "- 1 record with torch 3.0.0" in lines
    minutes = f"- {runs} minutes for the {runs} runs that were not interrupted"
    assert any(line.startswith(minutes) for line in lines)


def test_number_of_seeds_is_told(archive: Archive) -> None:
    assert "- Each method ran with 3 seeds." in page_of(archive)
    archive.runs.clear()
    assert "Each method ran" not in page_of(archive)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "results" not in path.parts
    }


@pytest.fixture(scope="module")
def written(reports: Path) -> Path:
    """Return a folder that contains a written report, and a file that does not belong to the report."""
    (reports / "other.txt").write_text("mine", encoding="utf-8")
    write_report(reports / "results", reports)
    return reports


def test_links_of_the_page_lead_to_files(written: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)]*)\)", text) if not target.startswith("http")}
    assert {"data.csv", "claims/memory.csv", "figures/flops.png", "figures/flops.svg"} < targets
    assert [target for target in targets if not (written / target).is_file()] == []
    assert "\npeft-edge report --records reports/results --out reports\n" in text


def test_other_files_in_the_folder_stay(written: Path) -> None:
    assert (written / "other.txt").read_text(encoding="utf-8") == "mine"
    assert not [name for name in contents(written) if "unfinished" in name]


def test_same_records_elsewhere_give_the_same_bytes(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "reports"
    shutil.copytree(written / "results", elsewhere / "results")
    main(["report", "--records", str(elsewhere / "results"), "--out", str(elsewhere)])
    printed = {Path(line).relative_to(elsewhere).as_posix() for line in capsys.readouterr().out.splitlines()}
    found = contents(elsewhere)
    assert printed == set(found)
    assert found == {name: content for name, content in contents(written).items() if name != "other.txt"}


def test_changed_record_changes_only_what_is_made_from_it(written: Path, tmp_path: Path) -> None:
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
    assert changed == {"README.md", "data.csv", "claims/accuracy.csv", "claims/choice.csv", *figures}


def test_without_matplotlib_nothing_is_written(reports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "peft-edge\[report\]"'):
        write_report(reports / "results", tmp_path / "reports")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_records_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--records", str(tmp_path), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no record" in capsys.readouterr().err
