from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.plan import Budget, Candidate, find_plan, search
from peft_edge.profiling.analysis import classification_loss, prepare_step
from peft_edge.profiling.memory import track_memory
from peft_edge.records import Record, StepProfile

MIB = 2**20


def measured_bytes(backbone: nn.Module, candidate: Candidate, *, batch_size: int, image_size: int) -> int:
    """The peak of a real step."""
    place = {} if candidate.target_modules is None else {"target_modules": candidate.target_modules}
    model, optimizer = prepare_step(
        backbone,
        candidate.method,
        lora_rank=candidate.lora_rank,
        adapter={"norm": candidate.norm, **place},
        lean=candidate.lean,
    )
    images = torch.randn(batch_size, 3, image_size, image_size)
    return track_memory(model, images, optimizer=optimizer, loss_fn=classification_loss).peak_bytes


def test_what_fits_is_measured_to_fit() -> None:
    backbone, step = load_backbone("test_efficientnet", 10), {"batch_size": 4, "image_size": 96}
    plan = find_plan(
        backbone,
        Budget(memory_bytes=4 * MIB),
        methods=["head", "lora", "lora-fa"],
        target_modules=["project", "all-conv"],
        lora_ranks=[4],
        **step,
    )
    assert {(candidate.method, candidate.norm, candidate.lean is not None) for candidate in plan.fitting} == {
        ("head", "stats", False),
        ("lora-fa", "stats", True),
        ("lora", "frozen", True),
    }
    assert [candidate.name for candidate in plan.exceeding] == ["lora, all-conv, rank 4", "lora-fa, all-conv, rank 4"]
    for candidate in plan.fitting:
        real = measured_bytes(load_backbone("test_efficientnet", 10), candidate, **step)
        assert real == candidate.profile.memory_peak_bytes <= 4 * MIB


@pytest.mark.slow
def test_ten_of_what_fits_a_large_step_are_measured_to_fit() -> None:
    plan = find_plan(load_backbone("mobilenetv2_100", 10), Budget(memory_bytes=256 * MIB))
    for candidate in random.sample(plan.fitting, 10):
        real = measured_bytes(load_backbone("mobilenetv2_100", 10), candidate, batch_size=16, image_size=224)
        assert real == candidate.profile.memory_peak_bytes <= 256 * MIB, candidate.name


class Costs:
    """In the place of an analysis: memory from a formula, and a list of what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(
        self, backbone: nn.Module, method: str, *, lora_rank: int, adapter: dict[str, Any], **options: Any
    ) -> Any:
        place, lean = adapter.get("target_modules"), options["lean"]
        self.asked.append((method, place, lora_rank, adapter["norm"], lean is not None))
        layers = {None: 2, "project": 2, "dense": 3, "all-conv": 4}[place]
        saved = 0 if lean is None else 10 if adapter["norm"] == "stats" else 15
        mib = 10 * layers + (lora_rank or 0) - saved
        profile = StepProfile(
            process_index=0, scope="step", memory_peak_bytes=mib * MIB, num_trainable_params=layers * (lora_rank or 1)
        )
        return SimpleNamespace(profile=[profile])


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Costs:
    costs = Costs()
    monkeypatch.setattr(search, "analyse", costs)
    return costs


def test_each_gets_the_mildest_setting_that_fits_and_nothing_is_tried_in_vain(
    tiny_backbone: nn.Module, costs: Costs
) -> None:
    plan = find_plan(
        tiny_backbone,
        Budget(memory_bytes=24 * MIB),
        methods=["head", "lora"],
        target_modules=["all-conv", "dense", "project"],
        lora_ranks=[8, 2],
    )
    found = {candidate.name: (candidate.norm, candidate.lean is not None) for candidate in plan.fitting}
    assert found == {
        "head": ("stats", False),
        "lora, project, rank 2": ("stats", False),
        "lora, project, rank 8": ("stats", True),
        "lora, dense, rank 2": ("stats", True),
        "lora, dense, rank 8": ("frozen", True),
    }
    # By what is trained: nothing is known of their accuracy.
    assert [candidate.name for candidate in plan.fitting][::4] == ["lora, dense, rank 8", "head"]
    assert [(candidate.name, candidate.excess) for candidate in plan.exceeding] == [
        ("lora, all-conv, rank 2", ["memory 27.0 MiB, 3.0 over"])
    ]
    asked = [entry[1:] for entry in costs.asked if entry[0] == "lora"]
    # From what a part of the layers, or a lower rank, needed.
    assert asked == [
        ("project", 2, "stats", False),
        ("project", 8, "stats", False),
        ("project", 8, "stats", True),
        ("dense", 2, "stats", False),
        ("dense", 2, "stats", True),
        ("dense", 8, "stats", True),
        ("dense", 8, "frozen", True),
        ("all-conv", 2, "stats", True),
        ("all-conv", 2, "frozen", True),
    ]


def test_norms_that_are_trained_are_not_frozen(tiny_backbone: nn.Module, costs: Costs) -> None:
    plan = find_plan(tiny_backbone, Budget(memory_bytes=0), methods=["full", "norm-affine", "galore"])
    assert {entry[3] for entry in costs.asked} == {"stats"}
    assert [candidate.name for candidate in plan.exceeding] == ["full", "norm-affine", "galore"]


def test_placements_of_the_same_layers_are_one(costs: Costs) -> None:
    resnet = load_backbone("resnet10t")
    plan = find_plan(
        resnet, Budget(), methods=["lora"], target_modules=["dense", "all-conv", "depthwise"], lora_ranks=[4]
    )
    assert [candidate.name for candidate in plan.fitting] == ["lora, dense, rank 4"]


def test_what_records_know_comes_first(
    tiny_backbone: nn.Module, costs: Costs, record: Callable[..., Record], tmp_path: Path
) -> None:
    (tmp_path / "head.json").write_text(record("head", 0.7).to_json(), encoding="utf-8")
    ways = {"methods": ["head", "lora"], "target_modules": ["dense"], "lora_ranks": [2, 8]}
    plan = find_plan(tiny_backbone, Budget(), **ways, records=tmp_path)
    assert [candidate.name for candidate in plan.fitting] == ["head", "lora, dense, rank 8", "lora, dense, rank 2"]
    assert plan.fitting[0].evidence is not None
    assert plan.fitting[0].evidence.accuracy == 0.7
    assert (plan.records, plan.is_same_backbone) == (1, False)
