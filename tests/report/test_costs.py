from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.records import Archive, CostRecord
from peft_edge.report.costs import LEAN, OURS, PLAIN, STORED, cost_rows

MakeCost = Callable[..., CostRecord]


@pytest.mark.parametrize(
    ("method", "kind", "setting", "family", "form"),
    [
        ("peft-lora", "depthwise", {}, "lora", PLAIN),
        ("lora", "transformer", {}, "lora", PLAIN),
        ("lora", "depthwise", {}, "lora", OURS),
        ("full", "standard", {}, "full", PLAIN),
        ("galore", "standard", {}, "galore", PLAIN),
        ("full", "standard", {"lean": "bit"}, "full", LEAN),
        ("lora", "depthwise", {"replay": True}, "lora", STORED),
    ],
)
def test_forms_of_training(
    cost: MakeCost, method: str, kind: str, setting: dict[str, object], family: str, form: str
) -> None:
    (row,) = cost_rows(Archive(costs={"a": cost(method, kind=kind, **setting)}))
    assert (row.family, row.form, row.method) == (family, form, f"{family} ({form})")


def test_ranks_of_one_method_are_told_apart_by_name(cost: MakeCost) -> None:
    rows = cost_rows(Archive(costs={str(rank): cost("peft-lora", lora_rank=rank) for rank in (1, 4)}))
    assert [row.method for row in rows] == ["lora (as it is), lora_rank=1", "lora (as it is), lora_rank=4"]
    assert [row.variant for row in rows] == ["lora, lora_rank=1", "lora, lora_rank=4"]


def test_no_analysis_is_left_out(archive: Archive) -> None:
    rows = cost_rows(archive, "results")
    assert {row.file for row in rows} == {f"results/{name}" for name in archive.costs}
    assert [row.kind for row in rows] == sorted((row.kind for row in rows), key="standard depthwise transformer".find)


def test_an_analysis_without_its_peak_is_named(cost: MakeCost) -> None:
    record = cost("full")
    record.profile.memory_peak_bytes = None
    with pytest.raises(ValueError, match=r"a\.json: .* memory_peak_bytes .* null"):
        cost_rows(Archive(costs={"a.json": record}))
