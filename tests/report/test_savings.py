from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.records import Archive, CostRecord
from peft_edge.report.costs import cost_rows
from peft_edge.report.savings import files_of, not_compared, savings

MakeCost = Callable[..., CostRecord]


def test_savings_are_against_full_fine_tuning_of_the_same_step(cost: MakeCost) -> None:
    costs = {
        "full": cost("full"),
        "full-1": cost("full", scale=0.1, batch_size=1),
        "full-source": cost("full", scale=10, accounting="source-study"),
        "lora": cost("peft-lora", scale=0.75),
        "lora-source": cost("lora", scale=2, accounting="source-study", lean="bit"),
        "lean": cost("full", scale=0.5, lean="bit"),
    }
    found = {one.cost.file: one for one in savings(cost_rows(Archive(costs=costs)))}
    assert set(found) == {"lora", "lora-source", "lean"}
    assert {file: one.full.file for file, one in found.items()} == {
        "lora": "full",
        "lora-source": "full-source",
        "lean": "full",
    }
    assert found["lora"].memory == pytest.approx(0.25)
    assert found["lora-source"].flops == pytest.approx(0.8)
    assert files_of(found.values()) == ["lora", "full", "lean", "lora-source", "full-source"]


def test_what_cannot_be_compared_is_told(cost: MakeCost) -> None:
    rows = cost_rows(Archive(costs={"full": cost("full", batch_size=1), "lora": cost("lora", batch_size=16)}))
    assert savings(rows) == []
    assert [row.file for row in not_compared(rows)] == ["lora"]
