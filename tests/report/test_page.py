from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from peft_edge.records import Archive, CostRecord, Record
from peft_edge.report.costs import cost_rows
from peft_edge.report.page import Rows, claims_of, page
from peft_edge.report.runs import run_rows


def text_of(archive: Archive) -> str:
    runs, costs = run_rows(archive, "results"), cost_rows(archive, "results")
    rows = Rows(archive=archive, folder="results", runs=runs, costs=costs)
    return page(rows, claims_of(rows), {}, "the command")


def test_every_row_with_a_number_links_to_records(archive: Archive) -> None:
    text = text_of(archive)
    targets = dict(re.findall(r"^\[(\d+)\]: results/(.*)$", text, re.MULTILINE))
    assert sorted(targets.values()) == sorted(archive.runs | archive.costs)
    heads = ("| ---", "| task |", "| method |", "| kind |")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(heads)]
    assert len(rows) > 50
    for row in rows:
        numbers = re.findall(r"\[(\d+)\]", row.split("|")[-2])
        assert numbers
        assert set(numbers) <= set(targets)


def test_a_summary_has_the_first_sentence_of_every_claim(archive: Archive) -> None:
    summary = text_of(archive).split("## Summary")[1].split("\n## ")[0]
    assert re.findall(r"\.\*\* (Agreed|In part|Not agreed):", summary) == [
        "Agreed" if number > 1 else answer for number, answer in enumerate(["In part", "Not agreed", "", "", ""])
    ]


def test_what_failed_is_listed_with_its_reason(archive: Archive, run: Callable[..., Record]) -> None:
    archive.runs["broken.json"] = run(status="diverged", seed=7)
    text = text_of(archive).split("## What did not succeed")[1]
    assert "| lora | mobile_net | 7 | diverged | ValueError: it broke | [" in text


def test_an_analysis_without_a_reference_is_listed(archive: Archive, cost: Callable[..., CostRecord]) -> None:
    archive.costs["alone.json"] = cost("lora", batch_size=99)
    text = text_of(archive)
    number = re.search(r"1 analyses have no full fine-tuning to be compared with: \[(\d+)\]\.", text)
    assert number is not None
    assert f"[{number[1]}]: results/alone.json" in text


@pytest.mark.parametrize("kind", ["runs", "costs"])
def test_a_missing_kind_of_record_is_told_and_the_rest_stands(archive: Archive, kind: str) -> None:
    getattr(archive, kind).clear()
    text = text_of(archive)
    assert text.count("**What was found.** Not measured:") == {"runs": 3, "costs": 2}[kind]
    assert text.count("**What was found.** ") == 5


def test_a_single_run_makes_a_page(run: Callable[..., Record]) -> None:
    text = text_of(Archive(runs={"a.json": run("lora")}))
    assert text.count("**What was found.** ") == 5
