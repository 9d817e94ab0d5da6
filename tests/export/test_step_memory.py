"""The predicted memory of a step, against sums by hand and against a real process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_edge import ConvLoraConfig
from peft_edge.backbones import head_names, load_backbone
from peft_edge.export.device import export_train_step
from peft_edge.export.step_memory import runtime_memory, runtime_process_memory, step_memory
from peft_edge.export.train_step import StepOptimizer, capture_graph, capture_train_step


@pytest.mark.parametrize("keeps", [False, True])
def test_tensors_are_freed_after_their_last_use(keeps: bool) -> None:
    def function(values: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = values["x"] > 0  # 1 byte an element
        large = torch.cat([values["x"]] * 10, 1)  # 40 bytes an element
        small = large.exp().sum(1, keepdim=True)  # `exp` overwrites its operand only if no later node needs the operand
        total = small * large[:, :1] if keeps else small
        return {"y": torch.where(mask, total * frozen["w"], total)}

    values, frozen = {"x": torch.randn(1000, 1).double()}, {"w": torch.randn(1000, 1).double()}
    constants, peak = step_memory(capture_graph(function, values, frozen))
    assert constants == 4000
    large = 40_000 * (1 + keeps)
    assert peak == 4000 + 1000 + large + 4000  # x, the mask and the sum


def test_process_with_the_runtime_is_measured() -> None:
    assert 2**24 < runtime_memory() < 2**28


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "size", "split"),
    [("mobilenetv2_050", "dense", 128, False), ("mobilenetv3_small_050", "last-stage", 96, True)],
)
def test_prediction_is_near_a_real_process(name: str, targets: str, size: int, split: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = load_backbone(name, 10)
    config = ConvLoraConfig(r=4, target_modules=targets, norm="frozen", modules_to_save=head_names(backbone))
    model = get_peft_model(backbone, config).eval()
    step = capture_train_step(model, torch.zeros(8, 3, size, size), StepOptimizer(), split=split)
    report = export_train_step(model, tmp_path / "step", image_size=size, split=split)
    assert runtime_process_memory(step.step) == pytest.approx(report.peak_rss_bytes, rel=0.15)
