"""A budget: amounts with units, and what exceeds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from peft_edge.records import StepProfile

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FLOPS = {"FLOP": 1, "MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
"""The units of amounts, and how many bytes or operations they are."""

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a training step, and the update that is shipped, may take; None for what does not matter."""

    memory_bytes: int | None = None
    """Bytes of tensors at the peak of a step: weights, activations, gradients, the optimizer's state."""

    flops: int | None = None
    """All arithmetic of a step."""

    adapter_bytes: int | None = None
    """Bytes of the saved update."""

    def excess(self, profile: StepProfile) -> list[str]:
        """Says what of the budget a step exceeds, and by how much; nothing if it fits."""
        kinds = [
            ("memory", self.memory_bytes, profile.memory_peak_bytes or 0, "MiB", 2**20),
            ("arithmetic", self.flops, step_flops(profile), "GFLOP", 10**9),
            ("saved update", self.adapter_bytes, profile.adapter_bytes or 0, "KiB", 2**10),
        ]
        return [
            f"{name} {found / size:,.1f} {unit}, {(found - most) / size:,.1f} over"
            for name, most, found, unit, size in kinds
            if most is not None and found > most
        ]

    def __str__(self) -> str:
        amounts = [
            (self.memory_bytes, "memory", "MiB", 2**20),
            (self.flops, "arithmetic", "GFLOP", 10**9),
            (self.adapter_bytes, "saved update", "KiB", 2**10),
        ]
        limits = [f"{name} {most / size:,g} {unit}" for most, name, unit, size in amounts if most is not None]
        return f"at most {', '.join(limits)}" if limits else "no limit"


def step_flops(profile: StepProfile) -> int:
    """All arithmetic of a step: products and elementwise, forward, backward and the optimizer's."""
    parts = ("forward", "backward", "elementwise_forward", "elementwise_backward", "optimizer")
    return sum(getattr(profile, f"flops_{part}") or 0 for part in parts)


def parse_bytes(text: str) -> int:
    """Reads an amount of bytes such as `256MiB`.

    Raises:
        ValueError: It is no number with a unit, or zero.
    """
    return _parse(text, BYTES, "256MiB")


def parse_flops(text: str) -> int:
    """Reads an amount of floating-point operations such as `3GFLOP`; a multiply-add is two.

    Raises:
        ValueError: It is no number with a unit, or zero.
    """
    return _parse(text, FLOPS, "3GFLOP")


def _parse(text: str, units: Mapping[str, int], example: str) -> int:
    sizes = {unit.lower(): size for unit, size in units.items()}
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in sizes:
        raise ValueError(f"{text!r} is no amount: expected a number and one of {', '.join(units)}, such as {example}")
    amount = round(float(match[1]) * sizes[match[2].lower()])
    if not amount:
        raise ValueError(f"{text!r} is nothing: expected more, such as {example}, or leave the budget out for no limit")
    return amount
