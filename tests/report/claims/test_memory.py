from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.records import Archive, CostRecord
from peft_edge.report.claims.memory import memory_claim
from peft_edge.report.costs import Cost, cost_rows

MakeCost = Callable[..., CostRecord]


def rows(cost: MakeCost, depthwise: float, transformer: float) -> list[Cost]:
    costs = {"d": cost("full"), "t": cost("full", network="llm", kind="transformer")}
    for method in ("lora", "dora", "galore"):
        ours = method if method == "galore" else f"peft-{method}"
        costs[f"d-{method}"] = cost(ours, scale=1 - depthwise)
        costs[f"t-{method}"] = cost(method, network="llm", kind="transformer", scale=1 - transformer)
    return cost_rows(Archive(costs=costs))


@pytest.mark.parametrize(
    ("depthwise", "transformer", "answer"),
    [(0.3, 0.6, "Agreed"), (0.03, 0.6, "In part"), (-0.4, 0.6, "In part"), (0.7, 0.6, "Not agreed")],
)
def test_half_is_half(cost: MakeCost, depthwise: float, transformer: float, answer: str) -> None:
    claim = memory_claim(rows(cost, depthwise, transformer))
    less, half = 3 * (depthwise < transformer), 3 * (answer == "Agreed")
    both = f"{100 * depthwise:.1f} % against {100 * transformer:.1f} %"
    assert claim.found == (
        f"{answer}: of 3 pairs of method and batch size, {less} save less on depthwise-separable networks than on "
        f"language models, and {half} about half as much (batch 16: lora {both}, dora {both}, galore {both})."
    )
    assert f"| {depthwise / transformer:.2f} |" in claim.section


def test_of_no_saving_there_is_no_half(cost: MakeCost) -> None:
    claim = memory_claim(rows(cost, -0.3, -0.6))
    assert claim.found.startswith("Not agreed: of 3 pairs of method and batch size, 0 save less")
    assert "| lora (as it is) | 16 | - | -30.0 | -60.0 | - |" in claim.section


def test_batch_sizes_are_compared_each_with_its_own(cost: MakeCost) -> None:
    small = [cost("full", batch_size=1, scale=0.1), cost("peft-lora", batch_size=1, scale=0.05)]
    costs = {str(number): record for number, record in enumerate(small)}
    more = cost_rows(Archive(costs=costs))
    text = memory_claim([*rows(cost, 0.3, 0.6), *more]).section
    assert "| lora (as it is) | 1 | - | 50.0 | - | - |" in text
    assert "| lora (as it is) | 16 | - | 30.0 | 60.0 | 0.50 |" in text


def test_lean_training_stands_beside(archive: Archive) -> None:
    claim = memory_claim(cost_rows(archive))
    assert claim.more[0] == (
        "Trained otherwise, the same methods save on depthwise-separable networks, on average: at batch 16 lora (lean) "
        "70.0 %, lora (on stored features) 97.0 %."
    )
    assert list(claim.pictures) == ["memory_batch_16"]
    assert "| depthwise | lora (lean) | 16 | 30.0 | 21.0 | 0.0 | 9.0 |" in claim.section


def test_what_is_missing_is_told(cost: MakeCost) -> None:
    assert "no record of a step of depthwise and of transformer networks" in memory_claim([]).found
    only = [row for row in rows(cost, 0.3, 0.6) if row.kind == "depthwise"]
    assert "no record of a step of transformer networks" in memory_claim(only).found
