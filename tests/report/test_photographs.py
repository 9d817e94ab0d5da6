from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from peft_edge.records import Archive, Record, TrainingCosts
from peft_edge.report.frames import run_frame
from peft_edge.report.page import make_report
from peft_edge.report.photographs import Photographs, photographs, short_labels

MakeRun = Callable[..., Record]
SCORES = {
    ("lora", "frozen"): (0.83, 0.85, 0.84),
    ("lora", "stats"): (0.80, 0.82, 0.84),
    ("full", "stats"): (0.85, 0.86, 0.87),
}


@pytest.fixture
def real(run: MakeRun) -> Archive:
    """Return an archive of runs on a folder of photographs with three seeds.

    With frozen norms, the retention is 0.9. Otherwise it is 0.1.
    """
    runs = {}
    for (method, norm), scores in SCORES.items():
        for seed, score in enumerate(scores):
            record = run(method, score=score, seed=seed, backbone="lite0", norm=norm)
            record.run_info.train_config["data"] |= {"name": "photo", "shift": "sketch", "image_size": 128}
            record.train_info.metrics[-1]["retention"] = 0.9 if norm == "frozen" else 0.1
            seconds = {"step_s": 10.0, "loading_s": 5.0 + seed, "storing_s": 1.0, "statistics_s": 0.0}
            record.train_info.costs = TrainingCosts(
                total_s=sum(seconds.values()), **seconds, validation_s=3.0, flops=10**12, process_peak_bytes=2**30
            )
            runs[f"{method}-{norm}-{seed}.json"] = record
    return Archive(runs=runs)


def section(archive: Archive) -> Photographs:
    found = photographs(archive, run_frame(archive, "results"))
    assert found is not None
    return found


def test_accuracies_have_standard_errors(real: Archive) -> None:
    ((title, table),) = section(real).tables.items()
    assert title == "photo, sketch, lite0"
    scores = [100 * score for score in SCORES["lora", "frozen"]]
    expected = f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores) / 3**0.5:.1f}"
    # Full fine-tuning is better by more than two standard errors of the paired differences.
    assert list(table.index) == ["**full**", "lora, norm=frozen, rank 4", "lora, norm=stats, rank 4"]
    row = table.loc["lora, norm=frozen, rank 4"]
    assert row.to_dict() == {
        "seeds": "3",
        "target [%]": expected,
        "source [%]": "90.0 ± 0.0",
        "retained [%]": "90.0 ± 0.0",
        "saved [KiB]": "3.91",
        "tensors in a step [MiB]": "104",
        "process [MiB]": "1,024",
        "training [s]": "17.0",
        "training [TFLOP]": "1.00",
    }


def test_a_single_seed_has_no_error_and_missing_costs_are_shown(real: Archive) -> None:
    record = real.runs["lora-frozen-0.json"]
    record.train_info.costs = None
    single = Archive(runs={"a.json": record})
    (table,) = section(single).tables.values()
    row = table.iloc[0]
    assert (row["target [%]"], row["process [MiB]"], row["training [TFLOP]"]) == ("83.0", "-", "-")


def test_full_fine_tuning_is_the_reference_under_any_setting(real: Archive, run: MakeRun) -> None:
    for seed in range(3):
        worse = run("full", score=0.5, seed=seed, backbone="lite0", norm="stats", training={"learning_rate": [1.0]})
        worse.run_info.train_config["data"] |= {"name": "photo", "shift": "sketch", "image_size": 128}
        real.runs[f"worse-{seed}.json"] = worse
    claim = section(real).claims["accuracy"]
    assert claim.verdict == "Not agreed"
    assert claim.finding.startswith("In 0 of 1 pairs")
    mean = 100 * (statistics.fmean(SCORES["lora", "frozen"]) - statistics.fmean(SCORES["full", "stats"]))
    assert f"On average the difference is {mean:+.1f} points" in claim.details


def test_frozen_norms_are_compared_with_batch_statistics(real: Archive) -> None:
    sentence = section(real).retention
    assert "keeps 90.0 % of the accuracy on the source with `norm=frozen`, and 10.0 % with `norm=stats`" in sentence
    gain = 100 * (statistics.fmean(SCORES["lora", "frozen"]) - statistics.fmean(SCORES["lora", "stats"]))
    assert f"{gain:.1f} points more accurate with `norm=frozen`" in sentence
    only = Archive(runs={name: record for name, record in real.runs.items() if "frozen" in name})
    assert section(only).retention == ""


def test_page_judges_each_claim_on_photographs_first(real: Archive, archive: Archive) -> None:
    def page(runs: dict[str, Any]) -> tuple[str, list[str]]:
        pages, tables, _ = make_report(Archive(runs=runs, costs=archive.costs), "results", {}, "the command")
        return pages["README.md"], list(tables)

    toys, _ = page(archive.runs)
    both, tables = page(archive.runs | real.runs)
    assert "photographs" in tables
    assert both.count("\n## Real photographs\n") == 1
    assert both.index("## Real photographs") < both.index("## In short") < both.index("## Accuracy")
    assert "*On photographs, not agreed*: In 0 of 1 pairs of network and task, the best" in both
    assert "On toys, agreed: In 4 of 4 pairs" in both
    # The sections on the toys do not change.
    for title in ("## In short", "## Accuracy", "## Update", "## Which method", "## Memory"):
        assert both.split(title)[1].split("\n## ")[0] == toys.split(title)[1].split("\n## ")[0]
    alone, _ = page(real.runs)
    assert "All runs on this page use image folders" in alone
    assert "toys" not in re.sub(r"> .*", "", alone)


def test_toys_alone_have_no_section(archive: Archive) -> None:
    assert photographs(archive, run_frame(archive)) is None
    assert photographs(Archive(), run_frame(Archive())) is None


def test_labels_stay_different() -> None:
    replayed = "lora, training.replay=True, training.replay_views=5, rank 4"
    plain = "lora, training.replay=False, training.replay_views=1, rank 4"
    assert short_labels([replayed, plain]) == ["lora, replay, 5 stored views, rank 4", "lora, rank 4"]
    same = ["lora, lean.masks=bit", "lora, lean.masks=byte"]
    assert short_labels(same) == same
