from __future__ import annotations

import pytest

from peft_edge.plan.budget import Budget, parse_bytes, parse_flops, step_flops
from peft_edge.records import StepProfile

PROFILE = StepProfile(
    process_index=0,
    scope="step",
    flops_forward=10**9,
    flops_backward=2 * 10**9,
    flops_elementwise_backward=3 * 10**8,
    memory_peak_bytes=300 * 2**20,
    adapter_bytes=2**17,
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("256MiB", 256 * 2**20), ("1.5 GB", 1_500_000_000), ("200kib", 204_800), ("512B", 512), (" 2 GiB ", 2**31)],
)
def test_bytes_have_units(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(("text", "amount"), [("3GFLOP", 3 * 10**9), ("0.5 TFLOP", 5 * 10**11), ("7mflop", 7 * 10**6)])
def test_arithmetic_has_units(text: str, amount: int) -> None:
    assert parse_flops(text) == amount


@pytest.mark.parametrize("text", ["256", "MiB", "256 MFLOP", "-1MiB", "1e3MiB", "1,000 B", ""])
def test_what_is_no_amount_is_named_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no amount: expected a number and one of B, .*, such as 256MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0MiB", "0.4B"])
def test_nothing_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="is nothing: expected more, such as 256MiB"):
        parse_bytes(text)


def test_what_is_exceeded_is_said_with_by_how_much() -> None:
    assert step_flops(PROFILE) == 3_300_000_000
    assert Budget().excess(PROFILE) == []
    tight = Budget(memory_bytes=parse_bytes("256MiB"), flops=parse_flops("3GFLOP"), adapter_bytes=2**17)
    assert tight.excess(PROFILE) == ["memory 300.0 MiB, 44.0 over", "arithmetic 3.3 GFLOP, 0.3 over"]
    assert str(tight) == "at most memory 256 MiB, arithmetic 3 GFLOP, saved update 128 KiB"


def test_exactly_the_budget_fits() -> None:
    assert Budget(memory_bytes=300 * 2**20).excess(PROFILE) == []
    assert Budget(memory_bytes=300 * 2**20 - 1).excess(PROFILE) != []
