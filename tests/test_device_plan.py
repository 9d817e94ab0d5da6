"""What a device can train within its memory."""

from __future__ import annotations

import pytest
import torch

from peft_edge.backbones import load_backbone
from peft_edge.device_plan import DeviceOption, device_plan_table, find_device_options
from peft_edge.export.step_memory import runtime_memory


def test_adapters_are_listed_with_the_memory_of_the_process() -> None:
    torch.manual_seed(0)
    backbone = load_backbone("test_efficientnet", 5)
    arguments = {"methods": ["lora"], "target_modules": ["last-stage", "conv_stem"], "lora_ranks": [1]}
    options = find_device_options(backbone, **arguments, batch_size=2, image_size=32)
    found = [(each.target_modules, each.split) for each in options]
    assert found == [("last-stage", True), ("last-stage", False), ("conv_stem", False)]
    split, whole, stem = options
    assert split.parameters == whole.parameters > stem.parameters
    assert runtime_memory() < split.process_bytes < whole.process_bytes


def test_methods_that_no_device_trains_are_refused() -> None:
    with pytest.raises(ValueError, match="only lora, lora-fa, dora can be exported to devices, found full"):
        find_device_options(torch.nn.Identity(), methods=["lora", "full"])


def test_table_names_what_fits_and_what_does_not() -> None:
    option = DeviceOption(
        method="lora", target_modules="dense", lora_rank=4, split=False, process_bytes=100 * 2**20, parameters=2560
    )
    small = DeviceOption(
        method="lora", target_modules="last-stage", lora_rank=4, split=True, process_bytes=60 * 2**20, parameters=256
    )
    table = device_plan_table([option, small], 70 * 2**20)
    assert "lora, last-stage, rank 4  features       60    1.0      0.3" in table
    assert "  lora, dense, rank 4, step on images: 100 MiB, 30 over" in table
    assert "nothing fits" in device_plan_table([option], 2**20)
    assert "do not fit" not in device_plan_table([option], None)
