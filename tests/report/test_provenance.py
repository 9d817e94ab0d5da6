from __future__ import annotations

from peft_edge.records import Archive
from peft_edge.report.provenance import limits_section, machine_section
from peft_edge.report.runs import run_rows


def test_machines_and_versions_are_counted(archive: Archive) -> None:
    archive.runs[next(iter(archive.runs))].meta_info.package_info = {"torch-version": "3.0.0"}
    text = machine_section(archive)
    runs, records = len(archive.runs), len(archive.runs) + len(archive.costs)
    assert f"- {runs} runs on Linux, x86_64, a processor, accelerator cpu, 1 CPU thread a process" in text
    assert f"- {records - 1} records with torch 2.0.0\n- 1 record with torch 3.0.0" in text
    assert f"- {runs} minutes in all of the {runs} runs" in text


def test_the_number_of_seeds_is_told(archive: Archive) -> None:
    assert "There are 3 seeds a method." in limits_section(run_rows(archive))
    assert "seeds" not in limits_section([])
