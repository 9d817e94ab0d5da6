"""Frames have what the records say, and the statistics are those of numpy and scipy."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats as scipy_stats

from peft_edge.bench.results import BenchRecord
from peft_edge.methods import METHODS
from peft_edge.records import Archive, CostRecord, Record
from peft_edge.report.claims import comparable_steps
from peft_edge.report.frames import (
    AS_IS,
    COST_COLUMNS,
    LEAN,
    NOT_LEAN,
    STORED,
    archive_frame,
    change_frame,
    cost_frame,
    distinguishing_settings,
    paired_differences,
    pareto_front,
    pooled_frame,
    read_bench,
    run_frame,
    timing_frame,
    variant_frame,
)

MakeRun = Callable[..., Record]
MakeCost = Callable[..., CostRecord]


def test_every_finished_run_has_a_row(archive: Archive) -> None:
    runs = run_frame(archive, "results")
    assert set(runs["file"]) == {f"results/{name}" for name in archive.finished}
    assert set(runs["task"]) == {"digits, blend", "digits, new classes"}


def test_domains_of_one_dataset_are_different_tasks(run: MakeRun) -> None:
    records = {}
    for domain in ("sketch", "cartoon"):
        records[domain] = run()
        photo, shift = ([["domain", "==", name]] for name in ("photo", domain))
        records[domain].run_info.train_config["data"] |= {"name": "PACS", "shift": None}
        records[domain].run_info.train_config["data"] |= {"source_filters": photo, "shift_filters": shift}
    tasks = set(run_frame(Archive(runs=records))["task"])
    assert tasks == {"PACS (photo), PACS (sketch)", "PACS (photo), PACS (cartoon)"}


def test_failed_run_has_no_row(run: MakeRun) -> None:
    assert run_frame(Archive(runs={"a.json": run(status="failed")})).empty


def test_network_is_depthwise_if_one_of_its_runs_changed_a_depthwise_layer(run: MakeRun) -> None:
    # The head alone changes no convolution.
    runs = {
        "a": run("head"),
        "b": run("lora"),
        "c": run("head", backbone="plain_net"),
        "d": run("head", backbone="new"),
        "e": run("full", backbone="plain_net"),
    }
    frame = run_frame(Archive(runs=runs))
    kinds = dict(zip(frame["backbone"], frame["kind"], strict=True))
    assert kinds == {"mobile_net": "depthwise", "plain_net": "standard", "new": "unknown"}


def test_only_methods_with_a_rank_show_one(run: MakeRun) -> None:
    runs = {name: run(name, lora_rank=16) for name in ("head", "lora", "galore", "full")}
    frame = run_frame(Archive(runs=runs))
    assert frame["variant"].tolist() == ["head", "full", "lora, rank 16", "galore, rank 16"]
    assert frame["lora_rank"].isna().tolist() == [True, True, False, False]


def test_differing_settings_of_a_method_are_part_of_its_name(run: MakeRun) -> None:
    runs = {norm: run("lora", norm=norm, seed=seed) for seed, norm in enumerate(("stats", "frozen"))}
    frame = run_frame(Archive(runs=runs))
    assert frame["variant"].tolist() == ["lora, norm=frozen, rank 4", "lora, norm=stats, rank 4"]
    assert set(frame["family"]) == {"lora"}


def test_folders_and_seeds_are_not_part_of_a_name(run: MakeRun) -> None:
    runs = {str(seed): run("lora", seed=seed, cache_dir=f"/cache/{seed}") for seed in range(3)}
    assert set(run_frame(Archive(runs=runs))["variant"]) == {"lora, rank 4"}


def test_two_records_of_one_run_raise_an_error_with_both_names(run: MakeRun) -> None:
    runs = {"a.json": run(score=0.5), "b.json": run(score=0.6)}
    with pytest.raises(ValueError, match=r"results/a\.json and results/b\.json are records of the same run"):
        run_frame(Archive(runs=runs), "results")


@pytest.mark.parametrize(("new_classes", "score"), [(False, 0.6), (True, 2 * 0.6 * 0.9 / (0.6 + 0.9))])
def test_score_of_new_classes_includes_old_classes(run: MakeRun, new_classes: bool, score: float) -> None:
    frame = run_frame(Archive(runs={"a": run(score=0.6, new_classes=new_classes)}))
    assert frame["score"].tolist() == pytest.approx([score])


def test_costs_of_a_run_are_the_whole_step_and_the_saved_bytes(run: MakeRun) -> None:
    frame = run_frame(Archive(runs={"a": run("full", lora_rank=4)}))
    assert frame.loc[0, COST_COLUMNS].tolist() == [2 * 100 * 2**20, 2 * (3 * 10**9 + 10**6 + 2 * 10**7), 4000]


@pytest.mark.parametrize("unknown", ["flops_optimizer", "memory_peak_bytes", "profile", "file_size"])
def test_costs_of_a_run_are_all_missing_if_one_was_not_measured(run: MakeRun, unknown: str) -> None:
    record = run("lora")
    if unknown == "profile":
        record.profile.clear()
    else:
        setattr(record.train_info if unknown == "file_size" else record.profile[0], unknown, None)
    assert run_frame(Archive(runs={"a": record}))[COST_COLUMNS].isna().all(axis=None)


@pytest.fixture
def variants(run: MakeRun) -> DataFrame:
    """Return a data frame with four methods on one task and network: three with three seeds, and `bias` with one."""
    scores = {"full": [0.80, 0.90, 0.70], "lora": [0.81, 0.88, 0.70], "head": [0.60, 0.70, 0.50], "bias": [0.99]}
    runs = {f"{m}{s}": run(m, score=score, seed=s) for m, values in scores.items() for s, score in enumerate(values)}
    return variant_frame(run_frame(Archive(runs=runs))).set_index("variant")


def test_best_variant_has_all_seeds(variants: DataFrame) -> None:
    assert set(variants["full_seeds"]) == {3}
    assert variants.index[variants["is_best"]].tolist() == ["full"]
    assert variants.loc["full", "score"] == pytest.approx(0.8)
    assert variants.loc["full", "records"] == "full0 full1 full2"


def test_variants_without_a_clear_difference_equal_the_best(variants: DataFrame) -> None:
    # The head is 20 points behind on every seed, although the seeds differ by as much.
    assert variants.index[variants["is_equal"]].tolist() == ["bias", "full", "lora, rank 4"]


def test_differences_are_paired_by_seed(variants: DataFrame) -> None:
    assert variants.loc["head", "to_full_mean"] == pytest.approx(-0.2)
    assert variants["to_full_pairs"].to_dict() == {"head": 3, "bias": 1, "full": 0, "lora, rank 4": 3}


def test_variants_that_train_nothing_are_marked(run: MakeRun) -> None:
    runs = {method: run(method) for method in ("none", "head", "full")}
    runs["none"].train_info.num_trainable_params = 0
    runs["full"].train_info.num_trainable_params = None
    frame = variant_frame(run_frame(Archive(runs=runs)))
    assert frame.loc[frame["trains"], "variant"].tolist() == ["head", "full"]


def test_variants_are_sorted_by_task_network_and_method(archive: Archive) -> None:
    frame = variant_frame(run_frame(archive))
    groups = dict(list(frame.groupby(["task", "backbone"], sort=False)))
    tasks, networks = ["digits, blend", "digits, new classes"], ["mobile_net", "plain_net"]
    assert list(groups) == [(task, network) for task in tasks for network in networks]
    assert [rows["kind"].unique().tolist() for rows in groups.values()] == [["depthwise"], ["standard"]] * 2
    names = ["none", "head", "full", "lora, rank 1", "lora, rank 16", "galore, rank 1", "galore, rank 16"]
    assert all(rows["variant"].tolist() == names for rows in groups.values())


def test_pooled_differences_are_over_all_networks_of_a_kind(run: MakeRun) -> None:
    scores = {("full", "net"): 0.8, ("full", "other"): 0.7, ("head", "net"): 0.6, ("head", "other"): 0.4}
    runs = {f"{m}-{net}-{s}": run(m, score=x, backbone=net, seed=s) for (m, net), x in scores.items() for s in (0, 1)}
    frame = pooled_frame(run_frame(Archive(runs=runs)))
    head = frame[frame["variant"] == "head"].squeeze()
    assert (head["task"], head["kind"], head["to_full_pairs"]) == ("digits, blend", "standard", 4)
    assert head["to_full_mean"] == pytest.approx(-0.25)
    assert len(head["records"].split()) == 4


def test_pooled_differences_leave_out_networks_of_unknown_kind(run: MakeRun) -> None:
    assert pooled_frame(run_frame(Archive(runs={"a": run("head")}))).empty


def test_paired_differences_are_those_of_the_paired_t_test() -> None:
    scores = DataFrame(np.random.default_rng(0).normal(size=(2, 7)), index=["a", "b"])
    found = paired_differences(scores, "b").loc["a"]
    test = scipy_stats.ttest_rel(scores.loc["a"], scores.loc["b"])
    assert found["mean"] / found["error"] == pytest.approx(test.statistic)
    assert found["error"] == pytest.approx(scipy_stats.sem(scores.loc["a"] - scores.loc["b"]))
    assert found["pairs"] == 7


def test_only_common_seeds_are_compared() -> None:
    scores = DataFrame({1: [0.5, 0.25], 2: [0.75, 0.25], 3: [9.0, None], 4: [None, 0.0]}, index=["a", "b"])
    found = paired_differences(scores, "b").loc["a"]
    assert (found["mean"], found["error"], found["pairs"]) == (0.375, 0.125, 2)
    assert paired_differences(scores, "c")["mean"].isna().all()
    assert paired_differences(scores[[1]], "b").loc["a", ["pairs", "clear"]].tolist() == [1, False]


@pytest.mark.parametrize(
    ("differences", "is_clear"),
    [([0.2, 0.4], True), ([-0.2, -0.4], True), ([0.0, 0.4], False), ([0, 0], False), ([0.5, 0.5], True), ([1], False)],
)
def test_difference_is_clear_beyond_two_standard_errors(differences: list[float], is_clear: bool) -> None:
    scores = DataFrame([differences, [0.0] * len(differences)], index=["a", "b"])
    assert paired_differences(scores, "b").loc["a", "clear"] == is_clear


def dominated(points: np.ndarray, number: int) -> bool:
    no_worse = (points <= points[number]).all(axis=1)
    better = (points < points[number]).any(axis=1)
    return bool((no_worse & better).any())


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_pareto_front_is_what_no_point_dominates(dimensions: int) -> None:
    # Few values, so that there are ties and equal points.
    points = np.random.default_rng(dimensions).integers(0, 5, size=(60, dimensions))
    found = pareto_front(points)
    assert found.tolist() == [not dominated(points, number) for number in range(len(points))]
    assert found.any()
    assert not found.all()


def test_every_changed_kernel_has_a_row(archive: Archive) -> None:
    frame = change_frame(archive, run_frame(archive, "results"))
    assert len(frame) == sum(len(run.train_info.changes) for run in archive.runs.values())
    layers = {"dense layers, depthwise networks", "dense layers, standard networks"}
    assert set(frame["layers"]) == {*layers, "depthwise layers, depthwise networks"}


@pytest.mark.parametrize(
    ("method", "kind", "setting", "family", "form"),
    [
        ("peft-lora", "depthwise", {}, "lora", AS_IS),
        ("lora", "transformer", {}, "lora", AS_IS),
        ("lora", "depthwise", {}, "lora", NOT_LEAN),
        ("full", "standard", {}, "full", AS_IS),
        ("galore", "standard", {}, "galore", AS_IS),
        ("full", "standard", {"lean": "bit"}, "full", LEAN),
        ("lora", "depthwise", {"replay": True}, "lora", STORED),
    ],
)
def test_form_of_training(
    cost: MakeCost, method: str, kind: str, setting: dict[str, object], family: str, form: str
) -> None:
    step = cost_frame(Archive(costs={"a": cost(method, kind=kind, **setting)})).squeeze()
    assert (step["family"], step["form"], step["method"]) == (family, form, f"{family} ({form})")


def test_differing_ranks_are_part_of_the_name_of_a_step(cost: MakeCost) -> None:
    frame = cost_frame(Archive(costs={str(rank): cost("peft-lora", lora_rank=rank) for rank in (1, 4)}))
    assert frame["method"].tolist() == ["lora (as it is), lora_rank=1", "lora (as it is), lora_rank=4"]
    assert frame["variant"].tolist() == ["lora, lora_rank=1", "lora, lora_rank=4"]


def test_every_analysis_has_a_row_sorted_by_kind(archive: Archive) -> None:
    frame = cost_frame(archive, "results")
    assert set(frame["file"]) == {f"results/{name}" for name in archive.costs}
    assert frame["kind"].tolist() == sorted(frame["kind"], key="standard depthwise transformer".find)


def test_analysis_without_its_peak_raises_an_error_with_its_name(cost: MakeCost) -> None:
    record = cost("full")
    record.profile.memory_peak_bytes = None
    with pytest.raises(ValueError, match=r"a\.json: .* memory_peak_bytes \(None\)"):
        cost_frame(Archive(costs={"a.json": record}))


def test_savings_are_against_full_fine_tuning_of_the_same_step(cost: MakeCost) -> None:
    costs = {
        "full": cost("full"),
        "full-1": cost("full", scale=0.1, batch_size=1),
        "full-source": cost("full", scale=10, accounting="source-study"),
        "lora": cost("peft-lora", scale=0.75),
        "lora-source": cost("lora", scale=2, accounting="source-study", lean="bit"),
        "lean": cost("full", scale=0.5, lean="bit"),
    }
    steps = comparable_steps(cost_frame(Archive(costs=costs))).set_index("file")
    assert steps["full_file"].to_dict() == {"lora": "full", "lora-source": "full-source", "lean": "full"}
    assert steps.loc["lora", "saved_memory"] == pytest.approx(0.25)
    assert steps.loc["lora-source", "saved_flops"] == pytest.approx(0.8)


def test_step_without_full_fine_tuning_is_not_comparable(cost: MakeCost) -> None:
    costs = {"full": cost("full", batch_size=1), "lora": cost("lora", batch_size=16)}
    frame = cost_frame(Archive(costs=costs)).set_index("file")
    assert comparable_steps(frame).empty
    assert frame["is_reference"].to_dict() == {"full": True, "lora": False}


def data_rows(archive: Archive, folder: str = "") -> dict[str, dict[str, str]]:
    text = archive_frame(archive, folder).to_csv(index=False)
    return {row["file"]: row for row in csv.DictReader(io.StringIO(text))}


def test_data_file_has_a_row_for_every_record(archive: Archive, run: MakeRun) -> None:
    archive.runs["failed.json"] = run(status="failed")
    rows = data_rows(archive, "results")
    assert set(rows) == {f"results/{name}" for name in archive.runs | archive.costs}
    assert rows["results/failed.json"]["train.status"] == "failed"
    assert rows["results/failed.json"]["result.test accuracy"] == ""


def test_data_file_has_the_figures_of_the_records(archive: Archive) -> None:
    rows = data_rows(archive)
    name, record = next((name, run) for name, run in archive.runs.items() if run.train_info.changes)
    row = rows[name]
    assert float(row["result.test accuracy"]) == record.train_info.metrics[-1]["test accuracy"]
    # An integer, although other rows have none.
    assert int(row["step.memory_peak_bytes"]) == record.profile[0].memory_peak_bytes
    assert row["config.data.new_classes"] == "[]"
    assert float(row["changes.pointwise.relative_norm"]) > 0
    name, cost = next(iter(archive.costs.items()))
    assert rows[name]["setting.accounting"] == cost.setting["accounting"]
    assert int(rows[name]["step.flops_forward"]) == cost.profile.flops_forward


def test_data_file_names_no_folder_of_the_machine(archive: Archive) -> None:
    assert "/somewhere" not in archive_frame(archive).to_csv()


def test_settings_that_one_row_lacks_distinguish_it() -> None:
    keys = DataFrame({"network": ["net", "net", "other"], "method": ["lora"] * 3})
    settings = [{"norm": "stats", "alpha": 8}, {"norm": "frozen", "alpha": 8}, {"norm": "affine"}]
    assert distinguishing_settings(keys, settings) == [", norm=stats", ", norm=frozen", ""]
    assert distinguishing_settings(keys[:2], [{}, {"lean": True}]) == [", lean=None", ", lean=True"]


def test_methods_are_in_the_order_of_the_registry_and_others_follow(run: MakeRun) -> None:
    runs = {method: run(method) for method in ["my-own", *reversed(METHODS)]}
    frame = run_frame(Archive(runs=runs))
    assert frame["method"].tolist() == [*METHODS, "my-own"]


def test_timings_have_a_row_for_each_contender(bench: BenchRecord, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(bench.to_json(), encoding="utf-8")
    frame = timing_frame({f"bench/{name}": record for name, record in read_bench(tmp_path).items()})
    assert frame["method"].tolist() == ["full fine-tuning", "our LoRA", "another package"]
    assert frame["ratio"].tolist()[:2] == [1.0, 0.516]
    assert frame["peak_bytes"].tolist()[0] == 3 * 2**20
    assert frame["peak_bytes"].isna().tolist() == [False, False, True]
    assert frame["error"].tolist() == ["", "", "it is not installed"]
    assert set(frame["record"]) == {"bench/net.json"}
    assert "process_bytes" not in frame
    bench.rows[0].rss_growth_bytes, bench.rows[1].compile_s = 4 * 2**20, 17.5
    frame = timing_frame({"bench/net.json": bench})
    assert frame["process_bytes"].tolist()[0] == 4 * 2**20
    assert frame["compile_s"].tolist()[1] == 17.5
    assert "ratio_without_huge_pages" not in frame


def test_folder_without_comparisons_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no record of peft-edge bench"):
        read_bench(tmp_path)


def test_file_that_is_no_comparison_raises_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter\.json is not a record of peft-edge bench"):
        read_bench(tmp_path)
