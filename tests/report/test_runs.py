from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from peft_edge.records import Archive, Record
from peft_edge.report.runs import all_flops, run_rows

MakeRun = Callable[..., Record]


def test_no_finished_run_is_left_out(archive: Archive) -> None:
    rows = run_rows(archive, "results")
    assert {row.file for row in rows} == {f"results/{name}" for name in archive.finished}
    assert {row.task for row in rows} == {"digits, blend", "digits, new classes"}


def test_failed_runs_are_no_rows(run: MakeRun) -> None:
    assert run_rows(Archive(runs={"a.json": run(status="failed")})) == []


def test_a_network_is_depthwise_if_any_of_its_runs_has_changed_a_depthwise_layer(run: MakeRun) -> None:
    # The head alone changes no convolution.
    runs = {
        "a": run("head"),
        "b": run("lora"),
        "c": run("head", backbone="plain_net"),
        "d": run("head", backbone="new"),
    }
    runs["e"] = run("full", backbone="plain_net")
    kinds = {row.backbone: row.kind for row in run_rows(Archive(runs=runs))}
    assert kinds == {"mobile_net": "depthwise", "plain_net": "standard", "new": None}


def test_ranks_belong_to_methods_that_have_one(run: MakeRun) -> None:
    runs = {name: run(name, lora_rank=16) for name in ("head", "lora", "galore", "full")}
    ways = [row.way for row in run_rows(Archive(runs=runs))]
    assert ways == ["head", "full", "lora, rank 16", "galore, rank 16"]


def test_settings_of_one_method_are_told_apart(run: MakeRun) -> None:
    runs = {norm: run("lora", norm=norm, seed=seed) for seed, norm in enumerate(("stats", "frozen"))}
    assert [row.way for row in run_rows(Archive(runs=runs))] == [
        "lora, norm=frozen, rank 4",
        "lora, norm=stats, rank 4",
    ]
    assert {row.family for row in run_rows(Archive(runs=runs))} == {"lora"}


def test_folders_and_seeds_do_not_tell_apart(run: MakeRun) -> None:
    runs = {str(seed): run("lora", seed=seed, cache_dir=f"/cache/{seed}") for seed in range(3)}
    assert {row.way for row in run_rows(Archive(runs=runs))} == {"lora, rank 4"}


def test_the_same_run_twice_is_an_error_that_names_both(run: MakeRun) -> None:
    runs = {"a.json": run(score=0.5), "b.json": run(score=0.6)}
    with pytest.raises(ValueError, match=r"results/a\.json and results/b\.json are records of the same run"):
        run_rows(Archive(runs=runs), "results")


@pytest.mark.parametrize(("new_classes", "score"), [(False, 0.6), (True, 2 * 0.6 * 0.9 / (0.6 + 0.9))])
def test_the_score_of_new_classes_counts_the_old_ones(run: MakeRun, new_classes: bool, score: float) -> None:
    (row,) = run_rows(Archive(runs={"a": run(score=0.6, new_classes=new_classes)}))
    assert row.score == pytest.approx(score)


def test_costs_are_the_whole_step_and_the_shipped_bytes(run: MakeRun) -> None:
    (row,) = run_rows(Archive(runs={"a": run("full", lora_rank=4)}))
    assert row.costs == (2 * 100 * 2**20, 2 * (3 * 10**9 + 10**6 + 2 * 10**7), 4000)


def test_costs_that_were_not_measured_are_unknown(run: MakeRun) -> None:
    record = run("lora")
    assert all_flops(dataclasses.replace(record.profile[0], flops_optimizer=None)) is None
    record.profile.clear()
    (row,) = run_rows(Archive(runs={"a": record}))
    assert row.costs is None
