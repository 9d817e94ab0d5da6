from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.lean import layers
from peft_edge.plan import (
    Budget,
    Evidence,
    Plan,
    PlanOption,
    Setting,
    Variant,
    evidence,
    find_plan,
    library_memory,
    parse_bytes,
    parse_flops,
    plan_table,
    process_memory,
    step_flops,
)
from peft_edge.profiling import analysis
from peft_edge.profiling.analysis import classification_loss, prepare_step
from peft_edge.profiling.memory import track_memory
from peft_edge.records import Record, StepProfile

PROFILE = StepProfile(
    process_index=0,
    scope="step",
    flops_forward=10**9,
    flops_backward=2 * 10**9,
    flops_elementwise_backward=3 * 10**8,
    memory_peak_bytes=300 * 2**20,
    adapter_bytes=2**17,
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("256MiB", 256 * 2**20), ("1.5 GB", 1_500_000_000), ("200kib", 204_800), ("512B", 512), (" 2 GiB ", 2**31)],
)
def test_parse_bytes_reads_units(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(("text", "amount"), [("3GFLOP", 3 * 10**9), ("0.5 TFLOP", 5 * 10**11), ("7mflop", 7 * 10**6)])
def test_parse_flops_reads_units(text: str, amount: int) -> None:
    assert parse_flops(text) == amount


@pytest.mark.parametrize("text", ["256", "MiB", "256 MFLOP", "-1MiB", "1e3MiB", "1,000 B", ""])
def test_wrong_amount_raises_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an amount: expected a number and one of B, .*, such as 256MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0MiB", "0.4B"])
def test_amount_of_zero_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is zero: expected more, such as 256MiB"):
        parse_bytes(text)


def test_excess_lists_each_limit_and_the_difference() -> None:
    assert step_flops(PROFILE) == 3_300_000_000
    assert Budget().excess(PROFILE) == []
    tight = Budget(memory_bytes=parse_bytes("256MiB"), flops=parse_flops("3GFLOP"), adapter_bytes=2**17)
    assert tight.excess(PROFILE) == ["memory 300.0 MiB, 44.0 over", "arithmetic 3.3 GFLOP, 0.3 over"]
    assert str(tight) == "at most memory 256 MiB, arithmetic 3 GFLOP, saved update 128 KiB"


def test_step_of_exactly_the_budget_fits() -> None:
    assert Budget(memory_bytes=300 * 2**20).excess(PROFILE) == []
    assert Budget(memory_bytes=300 * 2**20 - 1).excess(PROFILE) != []


MakeRecord = Callable[..., Record]


LORA, HEAD = Variant("lora", "dense", 4, "stats"), Variant("head", None, None, "stats")


def test_variants_are_compared_on_the_same_task(record: MakeRecord) -> None:
    # LoRA is better on both tasks, but has more runs on the hard one.
    runs = [record("lora", 0.9), record("head", 0.8), record("head", 0.8)]
    runs += [record("lora", accuracy, task="hard") for accuracy in (0.3, 0.4)] + [record("head", 0.1, task="hard")]
    known = evidence(runs)
    assert known[LORA].accuracy == pytest.approx((0.9 + 0.3 + 0.4) / 3)
    assert (known[LORA].runs, known[HEAD].runs) == (3, 3)
    assert known[LORA].accuracy < known[HEAD].accuracy
    means = ((0.9 + 0.8 + 0.8) / 3, (0.3 + 0.4 + 0.1) / 3)
    assert known[LORA].advantage == pytest.approx(((0.9 - means[0]) + (0.35 - means[1])) / 2)
    assert known[LORA].advantage > known[HEAD].advantage


MIB = 2**20


def measured_bytes(backbone: nn.Module, option: PlanOption, *, batch_size: int, image_size: int) -> int:
    """Return the peak memory of a real training step, in bytes."""
    place = {} if option.target_modules is None else {"target_modules": option.target_modules}
    model, optimizer = prepare_step(
        backbone,
        option.method,
        lora_rank=option.lora_rank,
        adapter={"norm": option.setting.norm, **place},
        lean=option.setting.lean,
    )
    images = torch.randn(batch_size, 3, image_size, image_size)
    return track_memory(model, images, optimizer=optimizer, loss_fn=classification_loss).peak_bytes


def test_options_that_fit_have_that_peak_in_a_real_step() -> None:
    budget, step = Budget(memory_bytes=3 * MIB), {"batch_size": 4, "image_size": 64}
    ways = {"methods": ["head", "lora"], "target_modules": ["project"], "lora_ranks": [4]}
    plan = find_plan(load_backbone("test_efficientnet", 10), budget, **ways, **step)
    assert plan.fitting
    for option in plan.fitting:
        real = measured_bytes(load_backbone("test_efficientnet", 10), option, **step)
        assert real == option.profile.memory_peak_bytes <= budget.memory_bytes


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("full", Setting("stats", {"masks": "bit", "inplace_norm": True, "recompute": True, "checkpoint": True})),
        ("galore", Setting("stats", {"masks": "bit", "inplace_norm": True, "recompute": "depthwise"})),
        ("conv-adapter", Setting("frozen", {"masks": "bit", "inplace_norm": True})),
        ("lora", Setting("frozen", {"masks": "bit", "inplace_norm": True, "recompute": True, "checkpoint": True})),
        ("lora", Setting("frozen", {"masks": "bit", "inplace_norm": True, "recompute": True, "split_blocks": True})),
        ("peft-lora", Setting("stats", {"masks": "bit"})),
    ],
)
def test_each_lean_setting_has_the_predicted_peak_in_a_real_step(
    method: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MAX_BLOCK_ELEMENTS", 1 << 15)  # so that blocks are split
    step = {"batch_size": 4, "image_size": 64}
    place = {"target_modules": "dense"} if method.endswith("lora") else {}
    cost = analysis.analyse(
        load_backbone("test_efficientnet", 10),
        method,
        lora_rank=4,
        adapter={"norm": setting.norm, **place},
        lean=setting.lean,
        **step,
    )
    option = PlanOption(
        method=method,
        target_modules=place.get("target_modules"),
        lora_rank=4,
        setting=setting,
        profile=cost.profile[0],
        excess=[],
    )
    real, predicted = measured_bytes(load_backbone("test_efficientnet", 10), option, **step), option.profile
    if setting.lean and setting.lean.get("recompute") and setting.norm == "stats":
        # Fake tensors also count the copies that a real backward pass avoids by working in place.
        assert real <= predicted.memory_peak_bytes <= 1.15 * real
    else:
        assert real == predicted.memory_peak_bytes


@pytest.mark.slow
def test_options_of_another_network_have_that_peak_in_a_real_step() -> None:
    step = {"batch_size": 8, "image_size": 64}
    budget = Budget(memory_bytes=20 * MIB)
    ways = {"methods": ["lora", "dora", "full"], "target_modules": ["dense"], "lora_ranks": [4]}
    plan = find_plan(load_backbone("mobilenetv2_100", 10), budget, **ways, **step)
    assert plan.fitting
    for option in plan.fitting:
        real = measured_bytes(load_backbone("mobilenetv2_100", 10), option, **step)
        assert real == option.profile.memory_peak_bytes <= budget.memory_bytes, option.name


REAL_STEPS = """
import torch
from peft_edge import training
from peft_edge.backbones import load_backbone
from peft_edge.profiling.analysis import classification_loss, prepare_step
from peft_edge.profiling.memory import peak_rss_bytes
from peft_edge.profiling.step import take_step

torch.set_num_threads(1)
backbone, images = load_backbone("mobilenetv2_100", 10), torch.randn(16, 3, 160, 160)
model, optimizer = prepare_step(backbone, "full", adapter={"norm": "stats"}, lean={"masks": "bit"})
for _ in range(4):
    take_step(model, images, optimizer, classification_loss)
print(peak_rss_bytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the prediction is for glibc")
def test_memory_of_a_real_process_is_predicted() -> None:
    step = {"batch_size": 16, "image_size": 160}
    cost = analysis.analyse(
        "mobilenetv2_100", "full", adapter={"norm": "stats"}, lean={"masks": "bit"}, **step
    ).profile[0]
    libraries = library_memory()
    ended = subprocess.run([sys.executable, "-c", REAL_STEPS], capture_output=True, text=True, check=True)
    real = int(ended.stdout.split()[-1])
    assert process_memory(cost, libraries) == pytest.approx(real, rel=0.15)


class Costs:
    """A replacement for `analyse`. It computes the memory by a formula, and lists its calls in `asked`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(
        self, backbone: nn.Module, method: str, *, lora_rank: int, adapter: dict[str, Any], **options: Any
    ) -> Any:
        place, lean = adapter.get("target_modules"), options["lean"]
        self.asked.append((method, place, lora_rank, str(Setting(adapter["norm"], lean))))
        layers = {None: 2, "project": 2, "dense": 3, "all-conv": 4}[place]
        saved = {False: 0, "depthwise": 1, True: 3}[lean.get("recompute", False)]
        saved += lean.get("split_blocks", 0) + 2 * lean.get("checkpoint", 0)
        mib = 10 * layers + (lora_rank or 0) - saved
        profile = StepProfile(
            process_index=0,
            scope="step",
            memory_peak_bytes=mib * MIB,
            num_trainable_params=layers * (lora_rank or 1),
            adapter_bytes=layers,
        )
        return SimpleNamespace(profile=[profile])


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Costs:
    costs = Costs()
    monkeypatch.setattr(analysis, "analyse", costs)
    return costs


def test_each_option_has_the_fewest_lean_options_that_fit(tiny_backbone: nn.Module, costs: Costs) -> None:
    plan = find_plan(
        tiny_backbone,
        Budget(memory_bytes=27 * MIB),
        methods=["head", "lora"],
        target_modules=["all-conv", "dense", "project"],
        lora_ranks=[8, 1],
    )
    found = {option.name: (option.setting.norm, option.setting.lean_text) for option in plan.fitting}
    assert found == {
        "head": ("frozen", "default"),
        "lora, project, rank 1": ("frozen", "default"),
        "lora, project, rank 8": ("frozen", "recompute=depthwise"),
        "lora, dense, rank 1": ("frozen", "recompute, split_blocks"),
    }
    # No accuracy is known, so most trained parameters come first.
    assert [option.name for option in plan.fitting][:2] == ["lora, project, rank 8", "lora, dense, rank 1"]
    assert [(option.name, option.excess) for option in plan.exceeding] == [
        ("lora, dense, rank 8", ["memory 32.0 MiB, 5.0 over"]),
        ("lora, all-conv, rank 1", ["memory 35.0 MiB, 8.0 over"]),
    ]
    asked = [entry[1:] for entry in costs.asked if entry[0] == "lora"]
    # The search starts from the setting that a part of the layers, or a lower rank, needed.
    texts = ("default", "recompute=depthwise", "recompute", "recompute, split_blocks")
    default, depthwise, recompute, split = (f"norm frozen, lean {text}" for text in texts)
    checkpoint = f"{split}, checkpoint"
    assert asked == [
        ("project", 1, default),
        *(("project", 8, setting) for setting in (default, depthwise)),
        *(("dense", 1, setting) for setting in (default, depthwise, recompute, split)),
        *(("dense", 8, setting) for setting in (split, checkpoint)),
        *(("all-conv", 1, setting) for setting in (split, checkpoint)),
    ]


def test_methods_that_train_norms_never_freeze_them(tiny_backbone: nn.Module, costs: Costs) -> None:
    ways = {"target_modules": ["dense"], "lora_ranks": [4]}
    methods = ["full", "norm-affine", "galore"]
    plan = find_plan(tiny_backbone, Budget(memory_bytes=0), methods=methods, norm="frozen", **ways)
    assert {entry[3].split(",")[0] for entry in costs.asked} == {"norm stats"}
    assert [option.method for option in plan.exceeding] == methods


def test_other_methods_use_the_given_norm_mode(tiny_backbone: nn.Module, costs: Costs) -> None:
    find_plan(tiny_backbone, Budget(), methods=["head"], norm="stats")
    find_plan(tiny_backbone, Budget(), methods=["peft-lora"], target_modules=["dense"], lora_ranks=[4], norm="frozen")
    assert [entry[3] for entry in costs.asked] == ["norm stats, lean default", "norm frozen, lean default"]


def test_networks_without_checkpointing_are_planned_without_it(
    tiny_backbone: nn.Module, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(tiny_backbone), "set_grad_checkpointing")
    find_plan(tiny_backbone, Budget(memory_bytes=0), methods=["head"])
    tried = ("default", "recompute=depthwise", "recompute", "recompute, split_blocks")
    assert [entry[3] for entry in costs.asked] == [f"norm frozen, lean {options}" for options in tried]


def test_lean_options_are_not_tried_if_other_limits_are_exceeded(tiny_backbone: nn.Module, costs: Costs) -> None:
    plan = find_plan(tiny_backbone, Budget(memory_bytes=0, adapter_bytes=1), methods=["head"])
    assert [entry[3] for entry in costs.asked] == ["norm frozen, lean default"]
    assert len(plan.exceeding[0].excess) == 2


def test_placements_with_the_same_layers_are_tried_once(costs: Costs) -> None:
    resnet = load_backbone("resnet10t")
    plan = find_plan(
        resnet, Budget(), methods=["lora"], target_modules=["dense", "all-conv", "depthwise"], lora_ranks=[4]
    )
    assert [option.name for option in plan.fitting] == ["lora, dense, rank 4"]


def test_options_with_records_come_first(
    tiny_backbone: nn.Module, costs: Costs, record: Callable[..., Record], tmp_path: Path
) -> None:
    (tmp_path / "head.json").write_text(record("head", 0.7).to_json(), encoding="utf-8")
    ways = {"methods": ["head", "lora"], "target_modules": ["dense"], "lora_ranks": [2, 8]}
    plan = find_plan(tiny_backbone, Budget(), **ways, norm="stats", records=tmp_path)
    assert [option.name for option in plan.fitting] == ["head", "lora, dense, rank 8", "lora, dense, rank 2"]
    assert plan.fitting[0].evidence is not None
    assert plan.fitting[0].evidence.accuracy == 0.7
    assert (plan.records, plan.is_same_backbone) == (1, False)


def test_runs_of_other_backbones_are_ignored_if_there_are_runs_of_this_one(
    tiny_backbone: nn.Module, costs: Costs, record: Callable[..., Record], tmp_path: Path
) -> None:
    tiny_backbone.name_or_path = "tiny"
    runs = {"other": record("head", 0.9), "same": record("head", 0.7, backbone="tiny")}
    for name, run in runs.items():
        (tmp_path / f"{name}.json").write_text(run.to_json(), encoding="utf-8")
    plan = find_plan(tiny_backbone, Budget(), methods=["head"], norm="stats", records=tmp_path)
    assert plan.fitting[0].evidence == Evidence(accuracy=0.7, runs=1, advantage=0.0)
    assert (plan.records, plan.is_same_backbone) == (1, True)


TABLE_PROFILE = StepProfile(
    process_index=0,
    scope="step",
    num_trainable_params=12_810,
    flops_forward=10**9,
    flops_optimizer=10**7,
    memory_peak_bytes=200 * 2**20,
    adapter_bytes=2**16,
)
TABLE_HEAD = PlanOption(
    method="head",
    target_modules=None,
    lora_rank=None,
    setting=Setting("stats", {"inplace_norm": True, "masks": "bit"}),
    profile=TABLE_PROFILE,
    excess=[],
)
TABLE_LORA = PlanOption(
    method="lora",
    target_modules="dense",
    lora_rank=4,
    setting=Setting("frozen", {"inplace_norm": True, "masks": "bit"}),
    profile=TABLE_PROFILE,
    excess=["memory 200.0 MiB, 8.0 over", "saved update 64.0 KiB, 4.0 over"],
    evidence=Evidence(accuracy=0.75, runs=3, advantage=0.1),
)


def test_table_has_a_line_for_each_option_and_reasons_for_the_others() -> None:
    plan = Plan(
        fitting=[TABLE_HEAD], exceeding=[TABLE_LORA], records=0, is_same_backbone=False, library_bytes=500 * 2**20
    )
    lines = plan_table(plan).splitlines()
    assert "nothing is known of their accuracy" in lines[0]
    assert lines[4].split() == ["head", "stats", "default", "200.0", "770", "1.01", "64.0", "12.8", "-"]
    assert lines[-1] == (
        "  lora, dense, rank 4 (norm frozen, lean default): memory 200.0 MiB, 8.0 over; saved update 64.0 KiB, 4.0 over"
    )


def test_table_explains_the_order_by_accuracy() -> None:
    plan = Plan(fitting=[TABLE_LORA, TABLE_HEAD], exceeding=[], records=3, is_same_backbone=True)
    lines = plan_table(plan).splitlines()
    assert "the most accurate first, by 3 runs on this backbone" in lines[0]
    assert lines[4].endswith("0.750 (3)")


def test_table_says_that_nothing_fits() -> None:
    table = plan_table(Plan(fitting=[], exceeding=[TABLE_LORA], records=0, is_same_backbone=False))
    assert table.startswith("nothing fits\n\nthese do not fit")
