from __future__ import annotations

import re
from collections.abc import Callable

from peft_edge.records import Archive, Record
from peft_edge.report.claims.choice import choice_claim, decision_table
from peft_edge.report.runs import Run, run_rows

MakeRun = Callable[..., Record]


def runs_of(run: MakeRun) -> list[Run]:
    """Full: the best, and dear. LoRA of rank 8: as good, and of rank 1 cheaper and worse. Head: dearer than that."""
    ways = {("full", 100): [0.9, 0.8], ("lora", 8): [0.89, 0.81], ("lora", 1): [0.6, 0.5], ("head", 2): [0.5, 0.4]}
    return run_rows(
        Archive(
            runs={
                f"{method}{rank}-{seed}": run(method, lora_rank=rank, seed=seed, score=score)
                for (method, rank), scores in ways.items()
                for seed, score in enumerate(scores)
            }
        )
    )


def test_the_front_is_what_no_other_beats_in_everything(run: MakeRun) -> None:
    claim = choice_claim(runs_of(run))
    assert claim.found == (
        "Agreed: in 1 of 1 pairs of network and task no method is best in everything; of 4 methods and ranks, 2 are "
        "Pareto-optimal."
    )
    # Of the same mean score, rank 8 costs less than full.
    names = re.findall(r"^\| digits, blend \| mobile_net \| (.*?) \| (\*\*)?", claim.section, re.MULTILINE)
    assert names == [("lora, rank 8", "**"), ("lora, rank 1", "")]
    assert "| lora, rank 8 | **85.0 ± 5.7** | 108.0 | 3.26 | 7.81 | [@lora8-0] [@lora8-1] |" in claim.section


def test_among_equals_the_cheapest_is_taken(run: MakeRun) -> None:
    text = decision_table(runs_of(run))
    assert text is not None
    assert text.splitlines()[-1].startswith(
        "| digits, blend | mobile_net | full (85.0 ± 7.1 %) | lora, rank 8 (108 MiB) | lora, rank 8 (3.26 GFLOP) | "
        "lora, rank 8 (7.81 KiB) |"
    )


def test_what_was_not_profiled_is_named(run: MakeRun) -> None:
    runs = {"none": run("none"), "full": run("full")}
    assert "not compared by cost: none." in choice_claim(run_rows(Archive(runs=runs))).section


def test_what_is_missing_is_told(run: MakeRun) -> None:
    rows = run_rows(Archive(runs={"none": run("none")}))
    assert choice_claim(rows).found.startswith("Not measured: there is no record of a run whose steps were profiled")
    assert decision_table(rows) is None
