"""A recipe makes its tensor, or is not followed."""

from __future__ import annotations

import torch

from peft_edge.functional.recipes import attach, recipe_of


def test_a_recipe_makes_the_tensor() -> None:
    x = torch.randn(4)
    y = attach(x.exp(), torch.exp, x)

    make, ingredients = recipe_of(y)

    assert ingredients == (x,)
    assert torch.equal(make(*ingredients), y)


def test_a_tensor_without_one_is_its_own() -> None:
    x = torch.randn(4)

    make, ingredients = recipe_of(x)

    assert ingredients == (x,)
    assert make(*ingredients) is x


def test_a_tensor_that_was_changed_is_its_own() -> None:
    x = torch.randn(4)
    y = attach(x.exp(), torch.exp, x)
    y.add_(1.0)

    make, ingredients = recipe_of(y)

    assert make(*ingredients) is y
