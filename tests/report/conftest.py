"""Fixtures with invented records, whose numbers follow simple formulas."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_edge.bench.results import BenchRecord, BenchRow, PhaseTimes
from peft_edge.records import (
    Archive,
    CostRecord,
    KernelChange,
    MetaInfo,
    Record,
    RunInfo,
    StepProfile,
    TrainInfo,
    add_record,
)

PACKAGES = {"torch-version": "2.0.0"}
STANDARD, DEPTHWISE = "plain_net", "mobile_net"
SCORES = {"none": 0.3, "head": 0.5, "full": 0.8, "lora": 0.78, "galore": 0.79}


def make_step(scale: float = 1.0) -> StepProfile:
    return StepProfile(
        process_index=0,
        scope="step",
        flops_forward=int(1e9 * scale),
        flops_backward=int(2e9 * scale),
        flops_optimizer=int(1e6 * scale),
        flops_elementwise_forward=int(1e7 * scale),
        flops_elementwise_backward=int(1e7 * scale),
        memory_peak_bytes=int(100 * 2**20 * scale),
        memory_parameters_bytes=int(30 * 2**20 * scale),
        memory_activations_bytes=int(70 * 2**20 * scale),
    )


def make_run(
    method: str = "lora",
    *,
    score: float = 0.7,
    seed: int = 0,
    lora_rank: int = 4,
    backbone: str = DEPTHWISE,
    new_classes: bool = False,
    status: str = "success",
    **config: Any,
) -> Record:
    data = {"name": "digits", "shift": None if new_classes else "blend", "image_size": 48}
    data["new_classes"] = ["6", "7"] if new_classes else []
    trained = method in ("full", "lora", "galore")
    kinds = ["pointwise", "depthwise"] if backbone == DEPTHWISE else ["dense", "pointwise"]
    changes = {
        f"layer{number}": KernelChange(kind=kind, relative_norm=0.1 * (number + 1), stable_rank=1 + lora_rank / 10)
        for number, kind in enumerate(kinds)
    }
    metrics = {
        "test accuracy": score,
        "test accuracy without update": 0.3,
        "source test accuracy": 0.9,
        "source test accuracy without update": 0.95,
        "harmonic mean": 2 * score * 0.9 / (score + 0.9),
        "retention": 0.9 / 0.95,
        "forgetting": 0.05,
    }
    return Record(
        run_info=RunInfo(
            created_at="",
            experiment_name="",
            total_time=60.0,
            error_msg="" if status == "success" else "Traceback\nValueError: it broke",
            train_config={
                "output_dir": f"/somewhere/{seed}",
                "method": method,
                "norm": "stats",
                "seed": seed,
                "num_threads": 1,
                "backbone": {"name": backbone},
                "data": data,
                "adapter": {"r": lora_rank},
                "galore": {"rank": lora_rank},
                "source": {"epochs": 1},
                **config,
            },
        ),
        train_info=TrainInfo(
            status=status,
            file_size=1000 * lora_rank,
            num_trainable_params=10,
            metrics=[{"step": 1}, metrics] if status == "success" else [],
            changes=changes if trained and status == "success" else {},
        ),
        meta_info=MetaInfo(
            model_info={},
            dataset_info={},
            package_info=PACKAGES,
            system_info={"system": "Linux", "machine": "x86_64", "processor": "a processor", "accelerator": "cpu"},
            pytorch_info="",
        ),
        profile=[] if method == "none" else [make_step(2 if method == "full" else 1 + lora_rank / 100)],
    )


def make_cost(
    method: str, *, network: str = DEPTHWISE, kind: str = "depthwise", scale: float = 1.0, **setting: Any
) -> CostRecord:
    blank = {"lora_rank": 4, "batch_size": 16, "image_size": 224, "sequence_length": None, "target_modules": None}
    blank |= {"norm": None, "lean": None, "inplace_norm": False, "replay": False, "accounting": "exact"}
    return CostRecord(
        created_at="",
        network=network,
        kind=kind,
        method=method,
        setting=blank | setting,
        num_total_params=100,
        profile=make_step(scale),
        package_info=PACKAGES,
    )


def make_runs() -> dict[str, Record]:
    draw = random.Random(0)
    runs = {}
    for backbone in (STANDARD, DEPTHWISE):
        for new_classes in (False, True):
            for method, mean in SCORES.items():
                for lora_rank in (1, 16) if method in ("lora", "galore") else (4,):
                    for seed in range(3):
                        score = mean + lora_rank / 1000 + draw.uniform(-0.01, 0.01)
                        name = f"{backbone}-{new_classes}-{method}-{lora_rank}-{seed}.json"
                        runs[name] = make_run(
                            method,
                            score=score,
                            seed=seed,
                            lora_rank=lora_rank,
                            backbone=backbone,
                            new_classes=new_classes,
                        )
    return runs


def make_costs() -> dict[str, CostRecord]:
    """Return cost records of six networks: two depthwise networks, two standard networks and two transformers.

    Full fine-tuning has the cost 1. Adapters and GaLore have the cost 0.9 on depthwise networks, 0.8 on standard
    networks and 0.4 on transformers. Records with special settings have other costs.
    """
    scales = {"depthwise": 0.9, "standard": 0.8, "transformer": 0.4}
    costs = {}
    for kind, scale in scales.items():
        peft = "" if kind == "transformer" else "peft-"
        for number in range(2):
            steps: list[tuple[str, float, dict[str, Any]]] = [("full", 1.0, {})]
            steps += [(method, scale, {}) for method in (f"{peft}lora", f"{peft}dora", "galore")]
            if kind != "transformer":
                steps += [
                    ("full", 1.0, {"accounting": "source-study"}),
                    ("peft-lora", 0.07, {"accounting": "source-study"}),
                    ("lora", 0.3, {"lean": "bit"}),
                    ("lora", 0.03, {"replay": True}),
                ]
            for method, size, setting in steps:
                name = "-".join(["cost", f"{kind}{number}", method, *setting])
                costs[f"{name}.json"] = make_cost(method, network=f"{kind}{number}", kind=kind, scale=size, **setting)
    return costs


@pytest.fixture
def archive() -> Archive:
    """Return an archive with runs of five methods on two networks and two tasks with three seeds, and cost records."""
    return Archive(runs=make_runs(), costs=make_costs())


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `reports`. Its subfolder `results` has the runs on one network and one task, and cost records."""
    reports = tmp_path_factory.mktemp("study") / "reports"
    runs = {name: run for name, run in make_runs().items() if name.startswith(f"{DEPTHWISE}-False")}
    for name, record in (runs | make_costs()).items():
        add_record(reports / "results", name.removesuffix(".json"), record)
    return reports


@pytest.fixture
def run() -> Callable[..., Record]:
    return make_run


@pytest.fixture
def cost() -> Callable[..., CostRecord]:
    return make_cost


@pytest.fixture
def bench() -> BenchRecord:
    """Return a benchmark of two contenders on one network, and a third contender that failed."""
    profile = StepProfile(process_index=0, scope="step", memory_peak_bytes=3 * 2**20)
    rounds = [PhaseTimes(forward_s=1.0, backward_s=2.0, optimizer_s=0.0)]
    return BenchRecord(
        created_at="",
        setting={"backbone": "net", "batch_size": 16, "image_size": 224, "threads": 1},
        rows=[
            BenchRow(name="full", label="full fine-tuning", profile=profile, rounds=rounds, ratio_median=1.0),
            BenchRow(name="lora", label="our LoRA", profile=profile, rounds=rounds, ratio_median=0.516),
            BenchRow(name="other", label="another package", error="it is not installed\nreally"),
        ],
        total_time=1.0,
        load_average=[0.0, 0.0],
        package_info={},
        system_info={"processor": "a processor", "cores": "2"},
        pytorch_info="",
    )
