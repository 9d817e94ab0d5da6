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
from peft_edge.profiling.rows import step_rows
from peft_edge.profiling.step import take_step
from peft_edge.records import StepProfile

BATCH, WIDTHS, RANKS = 6, [(16, 32), (32, 8), (8, 4)], [2, 4, 2]


@pytest.fixture
def two_ranks() -> PeftModel:
    """Three linear layers, the middle one with an adapter of another rank."""
    network = nn.Sequential(*(nn.Linear(*widths) for widths in WIDTHS))
    return get_peft_model(network, LoraConfig(r=2, rank_pattern={"1": 4}, target_modules=["0", "1", "2"]))


def count(model: nn.Module, *inputs: Tensor) -> list[StepProfile]:
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with FlopCounter(model) as flops, MemoryTracker(model, optimizer) as memory:
        take_step(model, inputs, optimizer, None)
    return step_rows(model, flops.result(), memory.result(), process_index=3)


def test_layers_of_each_rank_have_their_own_row(two_ranks: PeftModel) -> None:
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


def test_adapter_bytes_are_those_of_the_saved_tensors(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = ConvLoraConfig(r=3, target_modules="depthwise", norm="stats", modules_to_save=["classifier"])
    model = get_peft_model(tiny_backbone, config).train()
    step, layers = count(model, images)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert step.adapter_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert layers.adapter_bytes == sum(tensor.nbytes for name, tensor in saved.items() if ".lora_" in name)
    assert step.lora_rank == layers.lora_rank == 3


def test_only_active_adapters_count(two_ranks: PeftModel) -> None:
    two_ranks.add_adapter("other", LoraConfig(r=7, target_modules=["0"]))
    assert [row.lora_rank for row in count(two_ranks, torch.randn(BATCH, 16))] == [None, 2, 4]
    two_ranks.set_adapter("other")
    assert [row.lora_rank for row in count(two_ranks, torch.randn(BATCH, 16))] == [7, 7]


def test_without_an_adapter_the_update_is_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    (row,) = count(model, torch.randn(BATCH, 4))
    assert row.lora_rank is None
    assert row.adapter_bytes == 4 * (3 * 2 + 2)
    assert row.flops_optimizer == 2 * (3 * 2 + 2)
