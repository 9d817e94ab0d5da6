from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_edge.records import Archive, KernelChange, Record
from peft_edge.report.claims.updates import updates_claim
from peft_edge.report.runs import run_rows

MakeRun = Callable[..., Record]


def test_the_rank_and_the_stable_rank(archive: Archive) -> None:
    claim = updates_claim(run_rows(archive))
    # 1 + rank / 10, in every layer.
    assert claim.found.startswith(
        "Agreed: the median stable rank of dense layers' changes rises with the rank for 2 of 2"
    )
    assert "lora from 1.1 (relative norm 0.10) at rank 1 to 2.6 (relative norm 0.10) at rank 16" in claim.found
    assert claim.found.endswith("; full fine-tuning's is 1.4 (relative norm 0.10).")


def test_a_stable_rank_that_does_not_rise(run: MakeRun) -> None:
    runs = {str(rank): run("lora", lora_rank=rank) for rank in (1, 16)}
    for record in runs.values():
        for change in record.train_info.changes.values():
            change.stable_rank = 1.5
    assert updates_claim(run_rows(Archive(runs=runs))).found.startswith("Not agreed: ")


def test_medians_and_quartiles_over_layers_are_numpys(run: MakeRun) -> None:
    norms = np.random.default_rng(0).uniform(1, 2, size=(2, 9))
    runs = {}
    for seed, values in enumerate(norms):
        record = run("lora", seed=seed)
        record.train_info.changes = {
            f"layer{number}": KernelChange(kind="depthwise", relative_norm=value, stable_rank=1.0)
            for number, value in enumerate(values)
        }
        runs[str(seed)] = record
    lower, median, upper = np.percentile(norms, [25, 50, 75])
    text = updates_claim(run_rows(Archive(runs=runs))).section
    assert f"| lora, rank 4 | {median:.2f} [{lower:.2f}, {upper:.2f}] | 1.00 [1.00, 1.00] | [@0] [@1] |" in text


def test_depthwise_and_dense_layers_are_apart(archive: Archive) -> None:
    text = updates_claim(run_rows(archive)).section
    for name in ("dense layers, depthwise networks", "dense layers, standard networks", "depthwise layers"):
        assert f"relative norm, {name}" in text


def test_what_is_missing_is_told(run: MakeRun) -> None:
    assert updates_claim([]).found.startswith("Not measured: there is no record of the change of a kernel")
    one = run_rows(Archive(runs={"a": run("lora")}))
    assert updates_claim(one).found == "Not measured: no method was run with several ranks."
