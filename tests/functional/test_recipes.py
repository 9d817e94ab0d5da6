"""A recipe makes its tensor, or is not followed."""

from __future__ import annotations

import torch

from peft_edge.functional.recipes import attach, recipe_of


def test_a_recipe_makes_the_tensor() -> None:
    x = torch.randn(4)
    y = attach(x.exp(), recipe_of(x).then(torch.exp))

    recipe = recipe_of(y)

    assert not recipe.is_plain
    assert recipe.ingredients == (x,)
    assert torch.equal(recipe.make(x), y)
    assert torch.equal(recipe.then(torch.exp).make(x), y.exp())


def test_a_tensor_without_one_is_its_own() -> None:
    x = torch.randn(4)

    assert recipe_of(x).is_plain
    assert recipe_of(x).ingredients == (x,)
    assert recipe_of(x).make(x) is x


def test_a_tensor_that_was_changed_is_its_own() -> None:
    x = torch.randn(4)
    y = attach(x.exp(), recipe_of(x).then(torch.exp))
    y.add_(1.0)

    assert recipe_of(y).is_plain
    assert recipe_of(y).ingredients[0] is y
