from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.plan.evidence import evidence, on_backbone
from peft_edge.records import Record

MakeRecord = Callable[..., Record]


LORA, HEAD = ("lora", "dense", 4, "stats"), ("head", None, None, "stats")


def test_ways_are_compared_on_the_same_task(record: MakeRecord) -> None:
    # LoRA is better on either task, and was tried more often on the hard one.
    runs = [record("lora", 0.9), record("head", 0.8), record("head", 0.8)]
    runs += [record("lora", accuracy, task="hard") for accuracy in (0.3, 0.4)] + [record("head", 0.1, task="hard")]
    known = evidence(runs)
    assert known[LORA].accuracy == pytest.approx((0.9 + 0.3 + 0.4) / 3)
    assert (known[LORA].runs, known[HEAD].runs) == (3, 3)
    assert known[LORA].accuracy < known[HEAD].accuracy
    means = ((0.9 + 0.8 + 0.8) / 3, (0.3 + 0.4 + 0.1) / 3)
    assert known[LORA].advantage == pytest.approx(((0.9 - means[0]) + (0.35 - means[1])) / 2)
    assert known[LORA].advantage > known[HEAD].advantage


def test_records_of_a_backbone(record: MakeRecord) -> None:
    runs = [record("lora", 0.9), record("lora", 0.8, backbone="other")]
    assert on_backbone(runs, "other") == runs[1:]
