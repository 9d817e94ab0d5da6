from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_edge.backbones import load_backbone
from peft_edge.bench import contenders, run_bench
from peft_edge.bench.contenders import CONTENDERS, Contender
from peft_edge.profiling.analysis import analyse
from peft_edge.records import StepProfile

SMALL = {"batch_size": 2, "image_size": 64, "rounds": 2}


def without_times(profile: StepProfile | None) -> dict[str, object]:
    measured = ("_s", "peak_rss_bytes", "steps")
    return {name: value for name, value in vars(profile).items() if not name.endswith(measured)}


def test_a_real_step_costs_what_the_analysis_says() -> None:
    record = run_bench("mobilenetv2_035", ["lora-project"], **SMALL)
    full, project = record.rows
    backbone = load_backbone("mobilenetv2_035", 10)
    size = {"batch_size": 2, "image_size": 64}
    adapter = {"norm": "frozen", "target_modules": "project"}
    lean = analyse(backbone, "lora", lora_rank=4, adapter=adapter, lean=contenders.FOLDED, **size).profile[0]
    assert without_times(project.profile) == without_times(lean)
    assert without_times(full.profile) == without_times(analyse(backbone, None, **size).profile[0])
    assert [len(row.rounds) for row in record.rows] == [2, 2]
    assert all(times.step_s > 0 for row in record.rows for times in row.rounds)
    assert record.setting["threads"] == 1


def test_a_contender_that_fails_or_computes_something_else_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
        raise AttributeError("no\nsuch attribute")

    def change(model: nn.Module, lora_rank: int) -> tuple[nn.Module, None]:
        model.get_submodule("fc").bias.data += 10
        return model.requires_grad_(False).eval(), None

    monkeypatch.setitem(CONTENDERS, "fails", Contender("fails", fail))
    monkeypatch.setitem(CONTENDERS, "changes", Contender("changes", change))
    threads = torch.get_num_threads()
    rows = run_bench("test_resnet", ["fails", "changes", "inference"], **SMALL).rows
    assert [row.name for row in rows] == ["full", "fails", "changes", "inference"]
    assert rows[1].error == "no such attribute"
    assert rows[2].error.startswith("it computes something else than the network: logits differ by ")
    assert (rows[1].rounds, rows[1].profile, rows[3].error) == ([], None, "")
    assert rows[3].rounds[0].backward_s == rows[3].rounds[0].optimizer_s == 0
    assert torch.get_num_threads() == threads


def test_a_network_that_cannot_be_trained_on_such_images_is_named() -> None:
    with pytest.raises(ValueError, match="inception_v3 cannot be trained on images of 32 px: "):
        run_bench("inception_v3", ["inference"], batch_size=2, image_size=32, rounds=1)
