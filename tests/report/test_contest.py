from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.records import Archive, Record
from peft_edge.report.contest import Contest, contests, panel_grid
from peft_edge.report.runs import run_rows

MakeRun = Callable[..., Record]


@pytest.fixture
def contest(run: MakeRun) -> Contest:
    scores = {"full": [0.80, 0.90, 0.70], "lora": [0.81, 0.88, 0.70], "head": [0.60, 0.70, 0.50], "bias": [0.99]}
    runs = {f"{m}{s}": run(m, score=score, seed=s) for m, values in scores.items() for s, score in enumerate(values)}
    (found,) = contests(run_rows(Archive(runs=runs)))
    return found


def test_the_best_has_all_seeds(contest: Contest) -> None:
    assert contest.seeds == 3
    assert contest.best == "full"
    assert contest.mean("full") == pytest.approx(0.8)
    assert contest.best_of(lambda run: run.family == "lora") == "lora, rank 4"
    assert contest.best_of(lambda run: run.family == "dora") is None


def test_what_pairs_cannot_tell_apart_equals_the_best(contest: Contest) -> None:
    # The head is ten points behind on every seed, though scores of one seed differ as much from another's.
    assert contest.equals == ["bias", "full", "lora, rank 4"]


def test_differences_are_paired_by_seed(contest: Contest) -> None:
    found = contest.difference("head", "full")
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx(-0.2), 3)
    assert contest.difference("head", "galore") is None


def test_what_trains_nothing_is_told_by_its_parameters(run: MakeRun) -> None:
    runs = {method: run(method) for method in ("none", "head", "full")}
    runs["none"].train_info.num_trainable_params = 0
    runs["full"].train_info.num_trainable_params = None
    (found,) = contests(run_rows(Archive(runs=runs)))
    assert [of_way[0].way for of_way in found.trained] == ["head", "full"]


def test_contests_by_task_and_network(archive: Archive) -> None:
    found = contests(run_rows(archive))
    tasks, networks = ["digits, blend", "digits, new classes"], ["mobile_net", "plain_net"]
    assert [(one.task, one.backbone) for one in found] == [(task, name) for task in tasks for name in networks]
    assert [one.kind for one in found[:2]] == ["depthwise", "standard"]
    assert list(found[0].ways) == [
        "none",
        "head",
        "full",
        "lora, rank 1",
        "lora, rank 16",
        "galore, rank 1",
        "galore, rank 16",
    ]
    assert panel_grid(found[:3], "abc") == [["a", "b"], ["c", None]]
