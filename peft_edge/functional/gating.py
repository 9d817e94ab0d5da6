"""The product of a map and a gate for each of its channels, as squeeze-excite has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_edge.functional.exclusive import is_exclusive
from peft_edge.functional.recipes import Recipe, attach, recipe_of


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """The product x * gate, keeping of x what it can be made from.

    Args:
        x: (B, C, *size).
        gate: (B, C, 1, ...).
    """
    y = _Gated.apply(x, gate)
    recipe = recipe_of(x)
    ingredients = (gate, *recipe.ingredients)
    return attach(y, Recipe(lambda gate, *kept: recipe.make(*kept) * gate, ingredients, recipe.num_convolutions))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.make, ingredients, _ = recipe_of(x)
        ctx.save_for_backward(gate, *ingredients)
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, *ingredients = ctx.saved_tensors
        is_ours = is_exclusive(gradient)
        gradient_of_gate = (gradient * ctx.make(*ingredients)).sum_to_size(gate.shape)
        return gradient.mul_(gate) if is_ours else gradient * gate, gradient_of_gate
