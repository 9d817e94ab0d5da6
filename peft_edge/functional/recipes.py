"""Tensors that are made anew in the backward pass, from others that are kept there anyway.

The output of a smooth activation follows from its input, which the activation keeps: who needs the output in a backward
pass of its own keeps the recipe instead, which costs no memory, and an elementwise operation later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")


class Recipe(NamedTuple):
    """How to make a tensor."""

    make: Callable[..., Tensor]
    """From the ingredients to the tensor, bit for bit."""

    ingredients: tuple[Tensor, ...]
    """What is kept, by somebody else too."""

    num_convolutions: int = 0
    """What it costs; the rest is elementwise."""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is its own ingredient."""
        return self.make is _itself

    def then(self, function: Callable[[Tensor], Tensor], *, num_convolutions: int = 0) -> Recipe:
        """How to make what a function makes of the tensor."""
        types = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}

        def make(*ingredients: Tensor) -> Tensor:
            with ExitStack() as surroundings:
                # The backward pass runs outside of autocast.
                for device, dtype in types.items():
                    surroundings.enter_context(torch.autocast(device, dtype))
                return function(self.make(*ingredients))

        return Recipe(make, self.ingredients, self.num_convolutions + num_convolutions)


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Notes on a tensor how to make it, for `recipe_of`, and returns it."""
    if not torch.compiler.is_compiling():
        tensor._recipe = recipe, tensor._version  # type: ignore[attr-defined]
    return tensor


def recipe_of(tensor: Tensor) -> Recipe:
    """How to make a tensor: as `attach` noted it, unless it was changed in place since; else from itself."""
    if not torch.compiler.is_compiling():
        recipe, version = getattr(tensor, "_recipe", (None, None))
        if recipe is not None and version == tensor._version:
            return recipe
    return plain_recipe(tensor)


def plain_recipe(tensor: Tensor) -> Recipe:
    """The recipe that is the tensor."""
    return Recipe(_itself, (tensor,))


def _itself(tensor: Tensor) -> Tensor:
    return tensor
