from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from peft_edge import ConvLoraConfig
from peft_edge.profiling.flops import FlopCounter
from peft_edge.profiling.memory import MemoryTracker
from peft_edge.profiling.step import take_step
from peft_edge.profiling.tables import cost_table, profile_table, step_rows, text_table
from peft_edge.records import StepProfile

BATCH, WIDTHS, RANKS = 6, [(16, 32), (32, 8), (8, 4)], [2, 4, 2]


@pytest.fixture
def two_ranks() -> PeftModel:
    """Return three linear layers with LoRA: the middle layer has rank 4, and the others have rank 2."""
    network = nn.Sequential(*(nn.Linear(*widths) for widths in WIDTHS))
    return get_peft_model(network, LoraConfig(r=2, rank_pattern={"1": 4}, target_modules=["0", "1", "2"]))


def count(model: nn.Module, *inputs: Tensor) -> list[StepProfile]:
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with FlopCounter(model) as flops, MemoryTracker(model, optimizer) as memory:
        take_step(model, inputs, optimizer, None)
    return step_rows(model, flops.result(), memory.result(), process_index=3)


def test_layers_of_each_rank_have_a_row(two_ranks: PeftModel) -> None:
    step, *layers = count(two_ranks, torch.randn(BATCH, 16))
    assert (step.scope, step.lora_rank) == ("step", None)
    assert [(row.scope, row.lora_rank) for row in layers] == [("layers", 2), ("layers", 4)]
    assert {row.process_index for row in (step, *layers)} == {3}

    for row in layers:
        widths = [pair for pair, rank in zip(WIDTHS, RANKS, strict=True) if rank == row.lora_rank]
        base = sum(ins * outs for ins, outs in widths)
        adapter = sum(row.lora_rank * (ins + outs) for ins, outs in widths)
        assert row.flops_forward == 2 * BATCH * (base + adapter)
        assert row.adapter_bytes == 4 * adapter
        assert row.memory_parameters_bytes == 4 * (base + adapter + sum(outs for _, outs in widths))
        assert row.flops_optimizer is None
        assert row.peak_rss_bytes is None
    for name in ("flops_forward", "flops_backward", "adapter_bytes", "memory_parameters_bytes"):
        assert getattr(step, name) == sum(getattr(row, name) for row in layers)


def test_kinds_of_memory_add_up_to_the_peak(two_ranks: PeftModel) -> None:
    kinds = ("parameters", "buffers", "gradients", "activations", "temporaries", "optimizer")
    for row in count(two_ranks, torch.randn(BATCH, 16)):
        assert row.memory_peak_bytes == sum(getattr(row, f"memory_{kind}_bytes") for kind in kinds)


def test_adapter_bytes_match_the_saved_file(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = ConvLoraConfig(r=3, target_modules="depthwise", norm="stats", modules_to_save=["classifier"])
    model = get_peft_model(tiny_backbone, config).train()
    step, layers = count(model, images)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert step.adapter_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert layers.adapter_bytes == sum(tensor.nbytes for name, tensor in saved.items() if ".lora_" in name)
    assert step.lora_rank == layers.lora_rank == 3


def test_rows_count_active_adapters_only(two_ranks: PeftModel) -> None:
    two_ranks.add_adapter("other", LoraConfig(r=7, target_modules=["0"]))
    assert [row.lora_rank for row in count(two_ranks, torch.randn(BATCH, 16))] == [None, 2, 4]
    two_ranks.set_adapter("other")
    assert [row.lora_rank for row in count(two_ranks, torch.randn(BATCH, 16))] == [7, 7]


def test_adapter_bytes_without_an_adapter_are_the_trained_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    (row,) = count(model, torch.randn(BATCH, 4))
    assert row.lora_rank is None
    assert row.adapter_bytes == 4 * (3 * 2 + 2)
    assert row.flops_optimizer == 2 * (3 * 2 + 2)


def test_text_table_aligns_columns_to_the_right() -> None:
    assert text_table([("a", "long"), ("longer", "b")]) == "     a  long\nlonger     b"


def test_columns_of_a_group_share_a_unit_and_show_three_digits() -> None:
    costs = {
        "full": StepProfile(
            process_index=0,
            scope="step",
            flops_forward=9_624_000_000,
            flops_backward=18_900_000_000,
            flops_elementwise_forward=600_000_000,
            flops_elementwise_backward=1_200_000_000,
            flops_optimizer=49_000_000,
            memory_peak_bytes=1246 * 2**20,
            memory_peak_phase="backward",
            num_trainable_params=3_500_000,
            memory_gradients_bytes=0,
            adapter_bytes=5 * 2**10,
        ),
        "head": StepProfile(process_index=0, scope="step", flops_forward=10**9, memory_peak_bytes=2**20),
    }
    tables = (table.splitlines() for table in cost_table(costs).split("\n\n"))
    (caption, *arithmetic), (caption_of_memory, *memory) = tables
    assert caption == "arithmetic and time of a training step"
    assert caption_of_memory == "memory when it is at its peak, and the update"
    assert list(map(str.split, arithmetic)) == [
        ["GFLOP"] * 4,
        ["forward", "backward", "elementwise", "optimizer"],
        ["full", "9.62", "18.9", "1.80", "0.05"],
        ["head", "1.00", *"---"],
    ]
    assert list(map(str.split, memory)) == [
        [*["MiB"] * 6, "k", "B"],
        [
            "peak",
            "in",
            "peak",
            "parameters",
            "gradients",
            "activations",
            "temporaries",
            "optimizer",
            "trained",
            "saved",
        ],
        ["full", "backward", "1,246", "-", "0", "-", "-", "-", "3,500", "5,120"],
        ["head", "-", "1.00", *"-------"],
    ]


def test_column_without_values_is_left_out() -> None:
    table = cost_table({"a": StepProfile(process_index=0, scope="step", forward_s=0.0123, samples_per_s=1234.5)})
    units, titles, line = (line.split() for line in table.splitlines()[1:])
    assert units == ["ms", "ms", "ms", "per", "s"]
    assert titles == ["forward", "backward", "optimizer", "samples"]
    assert line == ["a", "12.3", "-", "-", "1,234"]


def test_profile_table_has_a_line_for_each_process_and_rank() -> None:
    rows = [
        StepProfile(process_index=0, scope="step", flops_forward=2),
        StepProfile(process_index=11, scope="layers", lora_rank=4, flops_forward=1),
    ]
    _, unit, title, *lines = profile_table(rows).splitlines()
    assert (unit.split(), title.split()) == (["FLOP"] * 4, ["forward", "backward", "elementwise", "optimizer"])
    assert [line.split("  ")[0].strip() for line in (line.strip() for line in lines)] == [
        "process 0",
        "process 11, layers of rank 4",
    ]
