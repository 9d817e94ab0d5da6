from __future__ import annotations

from collections.abc import Callable

import pytest
from pandas import DataFrame

from peft_edge.bench.contenders import CONTENDERS
from peft_edge.bench.results import BenchRecord
from peft_edge.records import Archive, CostRecord, StepProfile
from peft_edge.report.claims import (
    AGREED,
    CONTENDERS_ONLY_IN_CSV,
    IN_PART,
    NO_VALUE,
    NOT_AGREED,
    NOT_MEASURED,
    arithmetic_claim,
    fixed,
    interval,
    markdown_table,
    mean_and_deviation,
    memory_claim,
    not_measured,
    percent,
    short,
    timing_table,
    verdict_of,
)
from peft_edge.report.frames import cost_frame, timing_frame

MakeCost = Callable[..., CostRecord]


def step_frame(cost: MakeCost, depthwise: float, transformer: float, **more: CostRecord) -> DataFrame:
    """Return a data frame of step costs for a depthwise network and a language model.

    LoRA, DoRA and GaLore save the fraction `depthwise` of the cost of full fine-tuning on the depthwise network, and
    the fraction `transformer` on the language model.
    """
    costs = {"d": cost("full"), "t": cost("full", network="llm", kind="transformer"), **more}
    for method in ("lora", "dora", "galore"):
        ours = method if method == "galore" else f"peft-{method}"
        costs[f"d-{method}"] = cost(ours, scale=1 - depthwise)
        costs[f"t-{method}"] = cost(method, network="llm", kind="transformer", scale=1 - transformer)
    return cost_frame(Archive(costs=costs))


@pytest.mark.parametrize(("agreeing", "of", "answer"), [(3, 3, AGREED), (1, 3, IN_PART), (0, 3, NOT_AGREED)])
def test_verdict(agreeing: int, of: int, answer: str) -> None:
    assert verdict_of(agreeing, of) == answer


def test_missing_records_come_with_the_command_that_makes_them() -> None:
    claim = not_measured("a step", "costs.yaml")
    assert claim.verdict == NOT_MEASURED
    assert claim.finding == (
        "There is no record of a step; `peft-edge study --grid costs.yaml --output-dir runs` makes them, in "
        "`runs/results`."
    )


@pytest.mark.parametrize(
    ("depthwise", "transformer", "verdict"),
    [(0.3, 0.6, AGREED), (0.03, 0.6, IN_PART), (-0.4, 0.6, IN_PART), (0.7, 0.6, NOT_AGREED)],
)
def test_memory_verdict_depends_on_the_ratio(
    cost: MakeCost, depthwise: float, transformer: float, verdict: str
) -> None:
    claim = memory_claim(step_frame(cost, depthwise, transformer))
    less, half = 3 * (depthwise < transformer), 3 * (verdict == AGREED)
    assert claim.verdict == verdict
    assert claim.finding == (
        f"Of 3 pairs of method and batch size, {less} save less on depthwise-separable networks than on language "
        f"models, {'and' if half == less else 'but only'} {half} save about half as much."
    )
    assert claim.table is not None
    cells = [f"{100 * depthwise:.1f}", f"{100 * transformer:.1f}", f"{depthwise / transformer:.2f}"]
    assert all(row[1:] == cells for row in claim.table.to_numpy().tolist())


def test_negative_savings_have_no_ratio(cost: MakeCost) -> None:
    claim = memory_claim(step_frame(cost, -0.3, -0.6))
    assert claim.verdict == NOT_AGREED
    assert "3 pairs of method and batch size, 0 save less" in claim.finding
    assert claim.table is not None
    assert claim.table.loc[(16, "lora (as it is)")].tolist() == ["-", "-30.0", "-60.0", "-"]


def test_batch_sizes_are_compared_separately(cost: MakeCost) -> None:
    small = {"f1": cost("full", batch_size=1, scale=0.1), "l1": cost("peft-lora", batch_size=1, scale=0.05)}
    table = memory_claim(step_frame(cost, 0.3, 0.6, **small)).table
    assert table is not None
    assert table.loc[(1, "lora (as it is)")].tolist() == ["-", "50.0", "-", "-"]
    assert table.loc[(16, "lora (as it is)")].tolist() == ["-", "30.0", "60.0", "0.50"]


def test_memory_claim_includes_lean_training_and_stored_features(archive: Archive) -> None:
    claim = memory_claim(cost_frame(archive))
    ours = "70.0 % (lean, batch 16), 97.0 % (on stored features, batch 16)"
    assert claim.finding.endswith(f" Our LoRA saves {ours} on depthwise-separable networks.")
    assert claim.setting == "rank 4, 224 px"
    assert list(claim.charts) == ["memory_batch_16"]
    assert claim.data is not None
    rows = claim.data[(claim.data["kind"] == "depthwise") & (claim.data["method"] == "lora (lean)")]
    assert rows["saved_memory"].tolist() == pytest.approx([0.7, 0.7])
    assert rows["share_activations"].tolist() == pytest.approx([0.21, 0.21])
    assert rows["share_parameters"].tolist() == pytest.approx([0.09, 0.09])


def test_memory_claim_names_missing_kinds_of_networks(cost: MakeCost) -> None:
    assert "no record of a step of depthwise and of transformer networks" in memory_claim(DataFrame()).finding
    steps = step_frame(cost, 0.3, 0.6)
    claim = memory_claim(steps[steps["kind"] == "depthwise"])
    assert (claim.verdict, claim.table) == (NOT_MEASURED, None)
    assert "no record of a step of transformer networks" in claim.finding


def test_memory_claim_needs_a_common_batch_size(cost: MakeCost) -> None:
    costs = {"d": cost("full"), "d-lora": cost("peft-lora")}
    for name, method in (("t", "full"), ("t-lora", "lora")):
        costs[name] = cost(method, network="llm", kind="transformer", batch_size=1)
    assert memory_claim(cost_frame(Archive(costs=costs))).verdict == NOT_MEASURED


def test_arithmetic_claim_compares_both_accountings_and_stored_features(archive: Archive) -> None:
    claim = arithmetic_claim(cost_frame(archive))
    assert claim.verdict == NOT_AGREED
    assert claim.finding == (
        "Counted exactly, the largest reduction by an adapter is 20.0 % (lora on standard0). By the source study's "
        "accounting it is 93.0 % (lora on standard0). Counted exactly on stored features it is 97.0 % (lora on "
        "standard0)."
    )
    assert claim.table is not None
    assert claim.table.loc[("depthwise", "depthwise1")].to_dict() == {
        "lora: as it is, source study's accounting": "93.0",
        "lora: as it is, exact": "10.0",
        "lora: lean, exact": "70.0",
        "lora: on stored features, exact": "97.0",
        "dora: as it is, exact": "10.0",
    }
    assert claim.table.loc[("transformer", "transformer0"), "dora: as it is, exact"] == "60.0"
    assert claim.table.loc[("transformer", "transformer0"), "lora: lean, exact"] == NO_VALUE
    assert claim.data is not None
    assert set(claim.data["method"]) == {"lora", "dora", "galore"}


@pytest.mark.parametrize(("scale", "verdict"), [(0.04, AGREED), (0.09, AGREED), (0.2, NOT_AGREED)])
def test_arithmetic_verdict_depends_on_the_exact_count(cost: MakeCost, scale: float, verdict: str) -> None:
    costs = {"full": cost("full"), "lora": cost("peft-lora", scale=scale)}
    assert arithmetic_claim(cost_frame(Archive(costs=costs))).verdict == verdict


def test_arithmetic_claim_shows_the_batch_size_with_the_most_ways_of_counting(cost: MakeCost) -> None:
    costs = {
        "full-2": cost("full", batch_size=2),
        "lora-2": cost("peft-lora", batch_size=2, scale=0.5),
        "full": cost("full"),
        "lora": cost("peft-lora", scale=0.6),
        "lean": cost("lora", scale=0.7, lean="bit"),
    }
    claim = arithmetic_claim(cost_frame(Archive(costs=costs)))
    assert claim.setting == "rank 4, 224 px, batch 16"
    assert claim.finding.startswith("Counted exactly, the largest reduction by an adapter is 40.0 %")


def test_language_model_is_no_network_for_the_edge(cost: MakeCost) -> None:
    costs = {m: cost(m, kind="transformer", scale=s) for m, s in (("full", 1), ("lora", 0.01))}
    assert arithmetic_claim(cost_frame(Archive(costs=costs))).verdict == NOT_MEASURED


def test_arithmetic_claim_names_what_is_missing() -> None:
    assert arithmetic_claim(DataFrame()).finding.startswith("There is no record of an adapter's step")


def test_timing_table_shows_ratio_and_peak(bench: BenchRecord) -> None:
    table = timing_table(timing_frame({"bench/net.json": bench}))
    assert table["net, batch 16, 224 px"].to_dict() == {
        "full fine-tuning": "1.00 (3)",
        "our LoRA": "0.52 (3)",
        "another package": NO_VALUE,
    }


def test_timing_table_leaves_out_methods_that_are_only_in_the_csv_file(bench: BenchRecord) -> None:
    bench.rows[1].label = "plain inference"
    table = timing_table(timing_frame({"net.json": bench}))
    assert list(table.index) == ["full fine-tuning", "another package"]


def test_methods_that_are_only_in_the_csv_file_are_contenders_of_the_bench() -> None:
    assert {contender.label for contender in CONTENDERS.values()} > CONTENDERS_ONLY_IN_CSV


def test_timing_table_shows_the_ratio_without_huge_pages(bench: BenchRecord) -> None:
    bench.rows_without_huge_pages = [
        row.model_copy(update={"ratio_median": ratio}) for row, ratio in zip(bench.rows, (1.0, 0.6, None), strict=True)
    ]
    bench.rows[1].profile = StepProfile(process_index=0, scope="step")  # a compiled step
    table = timing_table(timing_frame({"bench/net.json": bench}))
    assert table["net, batch 16, 224 px"].to_dict() == {
        "full fine-tuning": "1.00 / 1.00 (3)",
        "our LoRA": f"0.52 / 0.60 ({NO_VALUE})",
        "another package": NO_VALUE,
    }


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(1234.56, 1, "1,234.6"), (-0.04, 1, "0.0"), (-0.06, 1, "-0.1"), (float("nan"), 2, NO_VALUE)],
)
def test_fixed(value: float, digits: int, text: str) -> None:
    assert fixed(value, digits) == text


@pytest.mark.parametrize(("value", "text"), [(0.123, "0.12"), (1.234, "1.23"), (12.34, "12.3"), (12345.6, "12,346")])
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_single_run_has_no_deviation() -> None:
    assert mean_and_deviation(0.6, 0.1) == "60.0 ± 10.0"
    assert mean_and_deviation(0.5, float("nan")) == "50.0"


def test_interval_of_equal_numbers_is_one_number() -> None:
    assert [interval(numbers) for numbers in ([3, 1, 2], [4, 4], [5])] == ["1 to 3", "4", "5"]


def test_markdown_table_aligns_words_left_and_numbers_right() -> None:
    frame = DataFrame({"share [%]": [percent(0.5)]}, index=["lora"]).rename_axis("method")
    assert markdown_table(frame).splitlines() == ["| method | share [%] |", "| --- | ---: |", "| lora | 50.0 |"]
