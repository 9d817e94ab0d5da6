"""Floating-point operations of a training step: counted as torch counts, but right for grouped convolutions."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from peft_edge.profiling.formulas import NORMALISATIONS, PRODUCTS, aten, convolution_backward, elementwise_formulas
from peft_edge.profiling.location import OPTIMIZER, StepLocation, ancestors
from peft_edge.profiling.step import Inputs, LossFn, fake_copy, take_step

Accounting = Literal["exact", "source-study"]
ACCOUNTINGS = get_args(Accounting)
_NORMALISATIONS = {getattr(aten, name) for name in NORMALISATIONS if hasattr(aten, name)}


@dataclass(kw_only=True)
class Flops:
    """Floating-point operations of a step; a multiply-add is two."""

    forward: int = 0
    """Convolutions, matrix products and attention, in the forward pass and the loss."""

    backward: int = 0
    """The same in the backward pass, what checkpointing computes again included."""

    optimizer: int = 0
    """All arithmetic of the update: the optimizer's, and clipping and scaling of gradients."""

    elementwise_forward: int = 0
    """Activations, normalisation, pooling, sums: everything else of the forward pass."""

    elementwise_backward: int = 0
    """The same of the backward pass."""


@dataclass(kw_only=True)
class FlopCount(Flops):
    """Floating-point operations of a step in total, by module and by operator."""

    by_module: dict[str, Flops] = field(default_factory=dict, repr=False)
    """By name in `named_modules`, with what is inside of it; `""` is the model without the loss and the optimizer."""

    by_operator: dict[str, Flops] = field(default_factory=dict, repr=False)
    """By torch's name, such as `aten.convolution_backward`."""


class FlopCounter:
    """Counts the operations inside its `with` block: those of one step, if one step is taken there.

    Args:
        model: Whose modules are told apart.
        accounting: `exact`, or `source-study`, which counts as the profiler of the source study does (arXiv
            2507.23536): with torch's formula for the backward of a convolution, which is the number of groups times
            too high in the gradient of the kernel, and with the batch norms among the convolutions.

    Raises:
        ValueError: The accounting is neither.
    """

    def __init__(self, model: nn.Module, accounting: Accounting = "exact") -> None:
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting is {accounting!r}, expected one of {', '.join(ACCOUNTINGS)}")
        self._is_exact = accounting == "exact"
        corrected = {aten.convolution_backward: convolution_backward} if self._is_exact else {}
        self._mode = FlopCounterMode(display=False, custom_mapping={**elementwise_formulas(), **PRODUCTS, **corrected})
        # It has the interface of torch's tracker, which would not tell the phases apart.
        location: Any = StepLocation(model)
        self._mode.mod_tracker = location
        self._entered = ExitStack()

    def __enter__(self) -> FlopCounter:
        self._entered.enter_context(self._mode)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.close()

    def result(self) -> FlopCount:
        """Returns what has been counted since the block was entered."""
        places: dict[Any, dict[Any, int]] = self._mode.flop_counts
        total = FlopCount()
        by_module: dict[str, Flops] = defaultdict(Flops)
        by_operator: dict[str, Flops] = defaultdict(Flops)
        for (phase, module), by_packet in places.items():
            for packet, flops in by_packet.items():
                is_main = phase == OPTIMIZER or self._is_main(packet)
                column = phase if is_main else f"elementwise_{phase}"
                modules = [by_module[name] for name in ancestors(module)]
                for entry in (total, by_operator[str(packet)], *modules):
                    setattr(entry, column, getattr(entry, column) + flops)
        return dataclasses.replace(total, by_module=dict(by_module), by_operator=dict(by_operator))

    def _is_main(self, packet: Any) -> bool:
        return packet not in elementwise_formulas() or (not self._is_exact and packet in _NORMALISATIONS)


def count_flops(
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accounting: Accounting = "exact",
) -> FlopCount:
    """Counts the floating-point operations of one training step, without computing it.

    The step is that of a copy with fake tensors: the model, its statistics and the optimizer stay as they are. What is
    frozen costs no gradient of its kernel, and what comes before the first trained layer none of its input.

    Args:
        model: In the mode that it is trained in; a model without trained parameters has no backward pass.
        inputs: A tensor or a tuple for positional arguments, a mapping for keyword arguments.
        optimizer: Of the model's parameters; None to count none.
        loss_fn: From the model's output to a scalar; by default `output.loss`, or the mean of the output.
        accounting: See `FlopCounter`.

    Raises:
        ValueError: The accounting is unknown, the loss is no scalar, or model or optimizer need a tensor's values.
    """
    mode, model, optimizer, inputs = fake_copy(model, optimizer, inputs)
    counter = FlopCounter(model, accounting)
    with mode:
        if optimizer is not None and not optimizer.state:
            # The first step of many optimizers does less, because there is no state yet.
            take_step(model, inputs, optimizer, loss_fn)
        with counter:
            take_step(model, inputs, optimizer, loss_fn)
    return counter.result()
