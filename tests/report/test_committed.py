"""The files in `reports/` are what their records say."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from peft_edge.report import write_report

REPORTS = Path(__file__).parents[2] / "reports"
PAGE = (REPORTS / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((REPORTS / "results").glob("*.json"))]


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report again from the committed records alone, and return its folder."""
    out = tmp_path_factory.mktemp("made") / "reports"
    for folder in ("results", "bench"):
        shutil.copytree(REPORTS / folder, out / folder)
    write_report(out / "results", out, bench=out / "bench")
    return out


def cells(first: str, table: str = PAGE) -> list[str]:
    """Return the cells that follow `first` in the table row that starts with `first`."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", table, re.MULTILINE)
    return [cell.strip(" *") for cell in row.split("|")]


@pytest.mark.slow  # half a minute, most of it for figures
def test_page_and_tables_are_those_of_the_records(again: Path) -> None:
    tables = sorted(file.name for file in (REPORTS / "claims").iterdir())
    assert tables == sorted(file.name for file in (again / "claims").iterdir())
    for name in ("README.md", "data.csv", *(f"claims/{table}" for table in tables)):
        assert (again / name).read_bytes() == (REPORTS / name).read_bytes(), name


@pytest.mark.slow
def test_figures_are_those_of_the_records(again: Path) -> None:
    committed = sorted((REPORTS / "figures").glob("*.png"))
    assert [file.name for file in committed] == sorted(file.name for file in (again / "figures").glob("*.png"))
    for file in committed:
        with Image.open(file) as picture, Image.open(again / "figures" / file.name) as made:
            if matplotlib.__version__ not in picture.info["Software"]:
                pytest.skip(f"{file} was drawn by {picture.info['Software']}: pixels differ between versions")
            assert picture.tobytes() == made.tobytes()


def test_page_has_at_most_250_lines() -> None:
    assert len(PAGE.splitlines()) <= 250


def test_saved_memory_and_flops_are_those_of_the_json_records(records: list[dict[str, Any]]) -> None:
    """Computed from the JSON files alone, without the package."""
    steps = {}
    for record in records:
        if "profile" in record and "network" in record:
            setting, profile = record["setting"], record["profile"]
            form = "replay" if setting["replay"] else setting["lean"]
            key = (record["network"], record["method"], setting["batch_size"], form, setting["accounting"])
            flops = profile["flops_forward"] + profile["flops_backward"]
            steps[key] = (record["kind"], profile["memory_peak_bytes"], flops)

    def mean_saving(kind: str, method: str, batch_size: int, form: str | None) -> str:
        savings = [
            1 - peak / steps[network, "full", batch_size, None, "exact"][1]
            for (network, name, size, its_form, accounting), (its_kind, peak, _) in steps.items()
            if (its_kind, name, size, its_form, accounting) == (kind, method, batch_size, form, "exact")
        ]
        return f"{100 * statistics.fmean(savings):.1f}"

    memory = PAGE.split("## Memory")[1].split("\n## ")[0]
    for batch_size in (2, 16):
        for method in ("lora", "dora"):
            depthwise, transformer = cells(f"{batch_size} | {method} (as it is)", memory)[1:3]
            assert depthwise == mean_saving("depthwise", f"peft-{method}", batch_size, None)
            assert transformer == mean_saving("transformer", method, batch_size, None)
        lean = cells(f"{batch_size} | lora (lean)", memory)[1]
        assert lean == mean_saving("depthwise", "lora", batch_size, "bit")

    for network in ("mobilenetv2_100", "efficientnet_lite0", "resnet18"):
        for column, accounting in enumerate(("source-study", "exact")):
            full = steps[network, "full", 16, None, accounting]
            adapter = steps[network, "peft-lora", 16, None, accounting]
            shown = cells(f"{full[0]} | {network}")[column]
            assert shown == f"{100 * (1 - adapter[2] / full[2]):.1f}"


def test_scores_are_those_of_the_json_records(records: list[dict[str, Any]]) -> None:
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if "run_info" not in record:
            continue
        config, results = record["run_info"]["train_config"], record["train_info"]["metrics"][-1]
        rank = {"lora": config["adapter"]["r"], "galore": config["galore"]["rank"]}.get(config["method"])
        name = config["method"] if rank is None else f"{config['method']}, rank {rank}"
        is_shift = not config["data"]["new_classes"]
        task = f"digits, {config['data']['shift'] if is_shift else 'new classes'}: {config['backbone']['name']}"
        scores[name, task].append(results["test accuracy" if is_shift else "harmonic mean"])
    section = PAGE.split("## Accuracy")[1].split("\n## ")[0]
    tasks = cells("method", section)
    assert len(tasks) == 6
    for name in ("none", "head", "full", "lora, rank 4", "lora, rank 16", "galore, rank 16"):
        for task, shown in zip(tasks, cells(name, section), strict=True):
            values = [100 * score for score in scores[name, task]]
            assert shown == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
