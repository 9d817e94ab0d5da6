from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pandas import DataFrame

from peft_edge.records import Archive, KernelChange, Record
from peft_edge.report.claims import AGREED, NOT_AGREED, NOT_MEASURED, Claim
from peft_edge.report.frames import change_frame, run_frame, variant_frame
from peft_edge.report.run_claims import accuracy_claim, choice_claim, decision_table, updates_claim

MakeRun = Callable[..., Record]


def accuracy_of(archive: Archive) -> Claim:
    runs = run_frame(archive)
    return accuracy_claim(runs, variant_frame(runs))


def updates_of(archive: Archive) -> Claim:
    return updates_claim(change_frame(archive, run_frame(archive)))


def table_of(claim: Claim) -> DataFrame:
    assert claim.table is not None
    return claim.table


def data_of(claim: Claim) -> DataFrame:
    assert claim.data is not None
    return claim.data


def compared(run: MakeRun, lora: list[float], full: list[float]) -> Claim:
    runs = {f"{m}{s}": run(m, score=x, seed=s) for m, xs in (("lora", lora), ("full", full)) for s, x in enumerate(xs)}
    return accuracy_of(Archive(runs=runs))


@pytest.mark.parametrize(
    ("lora", "verdict", "reaching"),
    [
        ([0.80, 0.70, 0.91], AGREED, 1),  # higher on one seed, lower on another
        ([0.85, 0.75, 0.95], AGREED, 1),  # higher on every seed
        ([0.75, 0.66, 0.84], NOT_AGREED, 0),  # lower on every seed
    ],
)
def test_accuracy_verdict_depends_on_paired_differences(
    run: MakeRun, lora: list[float], verdict: str, reaching: int
) -> None:
    claim = compared(run, lora, [0.8, 0.71, 0.9])
    assert claim.verdict == verdict
    assert claim.finding.startswith(f"In {reaching} of 1 pairs")


def test_mean_differences_are_told_for_each_kind_of_network(archive: Archive) -> None:
    less: dict[str, list[float]] = {}
    for name in ("mobile_net", "plain_net"):
        for task, metric in (("False", "test accuracy"), ("True", "harmonic mean")):
            means = {
                variant: np.mean(
                    [archive.runs[f"{name}-{task}-{variant}-{s}.json"].train_info.metrics[-1][metric] for s in range(3)]
                )
                for variant in ("full-4", "lora-1", "lora-16", "galore-1", "galore-16")
            }
            full = means.pop("full-4")
            less.setdefault(name, []).append(100 * (max(means.values()) - full))
    depthwise, standard = (np.mean(values) for values in less.values())
    text = f"{depthwise:+.1f} points on depthwise networks, {standard:+.1f} points on standard networks"
    assert text in accuracy_of(archive).details


def test_one_seed_gives_no_verdict(run: MakeRun) -> None:
    claim = compared(run, [0.5], [0.9])
    assert claim.verdict == NOT_MEASURED
    assert claim.finding.startswith("No network and task has both full fine-tuning and one of")


def test_accuracy_tables_have_means_deviations_and_paired_differences(archive: Archive) -> None:
    claim = accuracy_of(archive)
    names = [f"mobile_net-False-{{}}-{seed}.json" for seed in range(3)]
    lora, head = (
        100 * np.array([archive.runs[name.format(variant)].train_info.metrics[-1]["test accuracy"] for name in names])
        for variant in ("lora-16", "head-4")
    )
    cell = table_of(claim).loc["lora, rank 16", "digits, blend: mobile_net"]
    assert cell.strip("*") == f"{lora.mean():.1f} ± {lora.std(ddof=1):.1f}"
    data = data_of(claim).set_index(["task", "network", "method"])
    row = data.loc[("digits, blend", "mobile_net", "lora, rank 16")]
    assert (row["source"], row["source_std"]) == pytest.approx((0.9, 0.0))
    assert row["records"].split() == [name.format("lora-16") for name in names]
    pooled = data.loc[("digits, blend", "all depthwise networks", "lora, rank 16")]
    less = (lora - head) / 100
    for found in (row, pooled):
        assert found["to_head_mean"] == pytest.approx(less.mean())
        assert found["to_head_error"] == pytest.approx(less.std(ddof=1) / 3**0.5)
        assert found["to_head_clear"]


def test_scores_that_equal_the_best_are_bold(archive: Archive) -> None:
    table = table_of(accuracy_of(archive))
    is_bold = table.map(lambda cell: cell.startswith("**"))
    assert not is_bold.loc["head"].any()
    assert is_bold.sum().min() >= 1


def test_fewer_seeds_are_shown_beside_the_score(run: MakeRun) -> None:
    runs = {f"{m}{s}": run(m, score=0.5, seed=s) for m, seeds in (("head", 3), ("bias", 2)) for s in range(seeds)}
    table = table_of(accuracy_of(Archive(runs=runs)))
    assert table.squeeze().str.strip("*").tolist() == ["50.0 ± 0.0", "50.0 ± 0.0 (2)"]


def test_data_of_new_classes_have_new_and_old_accuracy(archive: Archive) -> None:
    data = data_of(accuracy_of(archive)).set_index(["task", "network", "method"])
    row = data.loc[("digits, new classes", "mobile_net", "full")]
    assert row["source"] == pytest.approx(0.9)
    assert row["target"] == pytest.approx(0.8, abs=0.02)
    assert row["target"] < row["score"] < row["source"]


def test_networks_of_unknown_kind_are_not_pooled(run: MakeRun) -> None:
    runs = {f"{m}{s}": run(m, seed=s, score=0.5 + s / 10) for m in ("head", "bias") for s in range(2)}
    data = data_of(accuracy_of(Archive(runs=runs)))
    assert set(data["kind"]) == {"unknown"}
    assert set(data["network"]) == {"mobile_net"}


def test_methods_that_train_nothing_have_no_chart(run: MakeRun) -> None:
    record = run("none")
    record.train_info.num_trainable_params = 0
    assert accuracy_of(Archive(runs={"a": record})).charts == {}


def test_accuracy_claim_names_what_is_missing() -> None:
    claim = accuracy_of(Archive())
    assert (claim.verdict, claim.table) == (NOT_MEASURED, None)
    assert claim.finding.startswith("There is no record of a run")


def test_stable_rank_rises_with_the_rank(archive: Archive) -> None:
    claim = updates_of(archive)
    assert claim.verdict == AGREED
    assert claim.finding == (
        "The median stable rank of the changes of dense layers rises with the rank for 2 of 2 methods."
    )
    # 1 + rank / 10, in every layer.
    assert "lora from 1.1 (relative norm 0.10) at rank 1 to 2.6 (relative norm 0.10) at rank 16" in claim.details
    assert claim.details.endswith("; full fine-tuning has 1.4 (relative norm 0.10).")


def test_constant_stable_rank_does_not_agree(run: MakeRun) -> None:
    runs = {str(rank): run("lora", lora_rank=rank) for rank in (1, 16)}
    for record in runs.values():
        for change in record.train_info.changes.values():
            change.stable_rank = 1.5
    assert updates_of(Archive(runs=runs)).verdict == NOT_AGREED


def test_quartiles_over_layers_are_numpys(run: MakeRun) -> None:
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
    claim = updates_of(Archive(runs=runs))
    assert table_of(claim).loc["lora, rank 4"].tolist() == [
        f"{median:.2f} [{lower:.2f}, {upper:.2f}]",
        "1.00 [1.00, 1.00]",
    ]
    row = data_of(claim).squeeze()
    assert row["relative_norm_median"] == pytest.approx(median)
    assert (row["changed_layers"], row["records"]) == (18, "0 1")


def test_depthwise_and_dense_layers_have_their_own_columns(archive: Archive) -> None:
    columns = list(table_of(updates_of(archive)))
    for measure in ("relative norm", "stable rank"):
        names = [f"{layers} networks" for layers in ("dense layers, depthwise", "dense layers, standard")]
        names.append("depthwise layers, depthwise networks")
        assert [column for column in columns if column.startswith(measure)] == [f"{measure}, {name}" for name in names]


def test_updates_claim_names_what_is_missing(run: MakeRun) -> None:
    assert updates_of(Archive()).finding.startswith("There is no record of the change of a kernel")
    claim = updates_of(Archive(runs={"a": run("lora")}))
    assert (claim.verdict, claim.finding) == (NOT_MEASURED, "No method was run with several ranks.")


@pytest.fixture
def variants(run: MakeRun) -> DataFrame:
    """Return a data frame of four variants of different accuracy and cost.

    Full fine-tuning has the best accuracy and the highest cost. LoRA of rank 8 is as accurate and cheaper. LoRA of rank
    1 is less accurate and the cheapest. The head is the least accurate, and costs more than LoRA of rank 1.
    """
    scores = {("full", 100): [0.9, 0.8], ("lora", 8): [0.89, 0.81], ("lora", 1): [0.6, 0.5], ("head", 2): [0.5, 0.4]}
    runs = {
        f"{method}{rank}-{seed}": run(method, lora_rank=rank, seed=seed, score=score)
        for (method, rank), of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    }
    return variant_frame(run_frame(Archive(runs=runs)))


def test_pareto_optimal_methods_are_listed(variants: DataFrame) -> None:
    claim = choice_claim(variants)
    assert claim.verdict == AGREED
    assert claim.finding == (
        "In 1 of 1 pairs of network and task no method is best in everything; of 4 methods and ranks, 2 are "
        "Pareto-optimal."
    )
    # Full has the same mean score as rank 8, and costs more.
    ((task, network, names),) = table_of(claim).index
    assert (task, network, names) == ("digits, blend", "mobile_net", "**lora, rank 8**; lora, rank 1")
    row = data_of(claim).set_index("method").loc["lora, rank 8"]
    assert (row["score"], row["peak_bytes"], row["shipped_bytes"]) == (pytest.approx(0.85), 108 * 2**20, 8000)
    assert row["records"] == "lora8-0 lora8-1"


def test_decision_table_takes_the_cheapest_of_equal_methods(variants: DataFrame) -> None:
    table = decision_table(variants)
    assert table is not None
    assert table.index.to_list() == [
        (
            "digits, blend",
            "mobile_net",
            "full (85.0 ± 7.1 %)",
            "lora, rank 8 (108 MiB)",
            "lora, rank 8 (3.26 GFLOP)",
            "lora, rank 8 (7.81 KiB)",
        )
    ]


def test_methods_without_a_profile_are_named(run: MakeRun) -> None:
    runs = run_frame(Archive(runs={"none": run("none"), "full": run("full")}))
    assert choice_claim(variant_frame(runs)).details.endswith("no training step was profiled: none.")


def test_choice_claim_names_what_is_missing(run: MakeRun) -> None:
    for runs in ({}, {"none": run("none")}):
        variants = variant_frame(run_frame(Archive(runs=runs)))
        claim = choice_claim(variants)
        assert claim.finding.startswith("There is no record of a run whose steps were profiled")
        assert decision_table(variants) is None
