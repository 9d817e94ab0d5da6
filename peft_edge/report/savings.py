"""What analysed steps save against full fine-tuning of the same network, as autograd does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_edge.report.costs import PLAIN, Cost

SOURCE_FAMILIES = ("lora", "dora", "galore")
"""The methods of the source study."""

# What must be the same for two steps to be compared.
_STEP = ("batch_size", "image_size", "sequence_length", "accounting")


@dataclass(frozen=True, kw_only=True)
class Saving:
    """An analysed step, and what it is compared with."""

    cost: Cost
    """The step."""

    full: Cost
    """The step of full fine-tuning."""

    @property
    def memory(self) -> float:
        """1 - peak / the peak of full fine-tuning."""
        return 1 - self.cost.peak / self.full.peak

    @property
    def flops(self) -> float:
        """The same of convolutions and matrix products, forward and backward."""
        return 1 - self.cost.flops / self.full.flops

    @property
    def files(self) -> tuple[str, str]:
        """The records of both."""
        return self.cost.file, self.full.file


def savings(costs: Sequence[Cost]) -> list[Saving]:
    """Returns the saving of every step that full fine-tuning was analysed for, and that is not full fine-tuning."""
    full: dict[tuple[Any, ...], Cost] = {}
    for cost in costs:
        if _is_reference(cost):
            full.setdefault(_step(cost), cost)
    return [
        Saving(cost=cost, full=full[_step(cost)]) for cost in costs if not _is_reference(cost) and _step(cost) in full
    ]


def not_compared(costs: Sequence[Cost]) -> list[Cost]:
    """Returns the steps that lack full fine-tuning to be compared with."""
    compared = {saving.cost.file for saving in savings(costs)}
    return [cost for cost in costs if not _is_reference(cost) and cost.file not in compared]


def setting_of(costs: Iterable[Cost]) -> str:
    """Returns the ranks, the sizes of the images and the lengths of the sequences in words."""
    units = {"lora_rank": "rank {}", "image_size": "{} px", "sequence_length": "{} tokens"}
    settings = [cost.record.setting for cost in costs]
    return ", ".join(
        text.format(" or ".join(map(str, values)))
        for key, text in units.items()
        if (values := sorted({setting[key] for setting in settings if setting.get(key) is not None}))
    )


def files_of(found: Iterable[Saving]) -> list[str]:
    """Returns the records of several savings, each once."""
    return list(dict.fromkeys(file for saving in found for file in saving.files))


def _is_reference(cost: Cost) -> bool:
    return cost.family == "full" and cost.form == PLAIN


def _step(cost: Cost) -> tuple[Any, ...]:
    return cost.network, *(cost.record.setting.get(key) for key in _STEP)
