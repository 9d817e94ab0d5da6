from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.records import Archive, CostRecord
from peft_edge.report.claims.arithmetic import arithmetic_claim
from peft_edge.report.costs import cost_rows

MakeCost = Callable[..., CostRecord]


def test_both_accountings_and_stored_features_side_by_side(archive: Archive) -> None:
    claim = arithmetic_claim(cost_rows(archive))
    assert claim.found == (
        "Not agreed: counted exactly, the largest reduction by an adapter is 20.0 % (lora on standard0); by the source "
        "study's accounting it is 93.0 % (lora on standard0); on stored features it truly is 97.0 % (lora on "
        "standard0)."
    )
    assert "| depthwise | depthwise1 | lora | 93.0 | 10.0 | 70.0 | 97.0 |" in claim.section
    assert "| transformer | transformer0 | dora | - | 60.0 | - | - |" in claim.section


@pytest.mark.parametrize(("scale", "answer"), [(0.04, "Agreed"), (0.09, "Agreed"), (0.2, "Not agreed")])
def test_agreement_is_decided_by_the_exact_count(cost: MakeCost, scale: float, answer: str) -> None:
    costs = {"full": cost("full"), "lora": cost("peft-lora", scale=scale)}
    assert arithmetic_claim(cost_rows(Archive(costs=costs))).found.startswith(f"{answer}: counted exactly")


def test_a_language_model_is_no_network_for_the_edge(cost: MakeCost) -> None:
    costs = {m: cost(m, kind="transformer", scale=s) for m, s in (("full", 1), ("lora", 0.01))}
    assert arithmetic_claim(cost_rows(Archive(costs=costs))).found.startswith("Not measured")


def test_what_is_missing_is_told() -> None:
    assert arithmetic_claim([]).found.startswith("Not measured: there is no record of an adapter's step")
