"""The costs of several methods on one network, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from peft_edge.methods import find_method
from peft_edge.profiling.analysis import analyse
from peft_edge.profiling.flops import Accounting
from peft_edge.records import StepProfile


def compare_methods(
    backbone: str | nn.Module,
    methods: Sequence[str],
    *,
    lora_ranks: Sequence[int],
    adapter: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    image_size: int = 224,
    optimizer: str = "adamw",
    accounting: Accounting = "exact",
) -> dict[str, StepProfile]:
    """Analyses every method, at every rank where it has one; see `analyse` for the arguments.

    Returns:
        The cost of a step by `method`, or `method, rank r`.

    Raises:
        ValueError: See `analyse`.
    """
    costs: dict[str, StepProfile] = {}
    pairs = [(method, lora_rank) for method in methods for lora_rank in lora_ranks]
    with tqdm(pairs, unit="step", leave=False, disable=None) as bar:
        for method, lora_rank in bar:
            has_rank = find_method(method).section == "adapter"
            name = f"{method}, rank {lora_rank}" if has_rank else method
            if name in costs:
                continue
            bar.set_description(f"analysing {method}")
            analysis = analyse(
                backbone,
                method,
                lora_rank=lora_rank,
                batch_size=batch_size,
                image_size=image_size,
                optimizer=optimizer,
                adapter=adapter,
                accounting=accounting,
            )
            costs[name] = analysis.profile[0]
    return costs
