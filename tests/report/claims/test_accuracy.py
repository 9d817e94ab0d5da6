from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from peft_edge.records import Archive, Record
from peft_edge.report.claims.accuracy import accuracy_claim
from peft_edge.report.runs import run_rows

MakeRun = Callable[..., Record]


def found(run: MakeRun, lora: list[float], full: list[float]) -> str:
    runs = {f"{m}{s}": run(m, score=x, seed=s) for m, xs in (("lora", lora), ("full", full)) for s, x in enumerate(xs)}
    return accuracy_claim(run_rows(Archive(runs=runs))).found


@pytest.mark.parametrize(
    ("lora", "answer"),
    [
        ([0.80, 0.70, 0.91], "Agreed: in 1 of 1"),  # higher here, lower there
        ([0.85, 0.75, 0.95], "Agreed: in 1 of 1"),  # higher on every seed
        ([0.75, 0.66, 0.84], "Not agreed: in 0 of 1"),  # lower on every seed
    ],
)
def test_reaching_full_fine_tuning(run: MakeRun, lora: list[float], answer: str) -> None:
    assert found(run, lora, [0.8, 0.71, 0.9]).startswith(answer)


def test_kinds_of_networks_are_apart(archive: Archive) -> None:
    text = accuracy_claim(run_rows(archive)).found
    less = {}
    for name in ("mobile_net", "plain_net"):
        for number, task in enumerate(("False", "True")):
            metric = ("test accuracy", "harmonic mean")[number]
            means = {
                way: np.mean(
                    [archive.runs[f"{name}-{task}-{way}-{s}.json"].train_info.metrics[-1][metric] for s in range(3)]
                )
                for way in ("full-4", "lora-1", "lora-16", "galore-1", "galore-16")
            }
            full = means.pop("full-4")
            less.setdefault(name, []).append(100 * (max(means.values()) - full))
    depthwise, standard = (np.mean(values) for values in less.values())
    assert f"{depthwise:+.1f} points on depthwise networks, {standard:+.1f} points on standard networks" in text


def test_one_seed_decides_nothing(run: MakeRun) -> None:
    assert found(run, [0.5], [0.9]).startswith("Not measured: no network and task")


def test_means_deviations_and_paired_differences(archive: Archive) -> None:
    text = accuracy_claim(run_rows(archive)).section
    names = [f"mobile_net-False-{{}}-{seed}.json" for seed in range(3)]
    lora, head = (
        100 * np.array([archive.runs[name.format(way)].train_info.metrics[-1]["test accuracy"] for name in names])
        for way in ("lora-16", "head-4")
    )
    assert f"| lora, rank 16 | {lora.mean():.1f} ± {lora.std(ddof=1):.1f} | 90.0 ± 0.0 |" in text
    less = lora - head
    (row,) = re.findall(r"^\| lora, rank 16 \| [^|]* \| [^|]* \| [^|]* \| (\*\*\+.*?) \|", text, re.MULTILINE)[:1]
    assert row == f"**+{less.mean():.1f} ± {less.std(ddof=1) / 3**0.5:.1f}**"


def test_what_is_not_told_apart_from_the_best_is_listed(archive: Archive) -> None:
    text = accuracy_claim(run_rows(archive)).section
    rows = re.findall(r"^\| digits.*$", text, re.MULTILINE)
    assert len(rows) == 4
    assert all("head" not in row for row in rows)


def test_new_classes_show_new_and_old(archive: Archive) -> None:
    text = accuracy_claim(run_rows(archive)).section
    assert "| method | mobile_net, mean | mobile_net, new | mobile_net, old |" in text
    assert "| method | mobile_net, target | mobile_net, source |" in text


def test_networks_of_an_unknown_kind_are_not_pooled(run: MakeRun) -> None:
    runs = {f"{m}{s}": run(m, seed=s, score=0.5 + s / 10) for m in ("head", "bias") for s in range(2)}
    claim = accuracy_claim(run_rows(Archive(runs=runs)))
    assert "| unknown |" in claim.section
    assert "paired differences in points" not in claim.section


def test_of_what_trains_nothing_there_is_no_figure(run: MakeRun) -> None:
    record = run("none")
    record.train_info.num_trainable_params = 0
    claim = accuracy_claim(run_rows(Archive(runs={"a": record})))
    assert claim.pictures == {}
    assert "figures/" not in claim.section


def test_what_is_missing_is_told() -> None:
    assert accuracy_claim([]).found.startswith("Not measured: there is no record of a run")
