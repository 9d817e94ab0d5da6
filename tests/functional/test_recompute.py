"""A recipe makes its tensor, or is not followed.

A gradient counts as ours only where nothing else can see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from peft_edge.functional.activations import Kept, clipped_activation
from peft_edge.functional.batch_norm import frozen_batch_norm
from peft_edge.functional.recompute import can_overwrite, get_recompute, set_recompute


def test_a_recipe_makes_the_tensor() -> None:
    x = torch.randn(4)
    y = set_recompute(x.exp(), get_recompute(x).then(torch.exp))

    recipe = get_recompute(y)

    assert not recipe.is_plain
    assert recipe.ingredients == (x,)
    assert torch.equal(recipe.make(x), y)
    assert torch.equal(recipe.then(torch.exp).make(x), y.exp())


def test_a_tensor_without_one_is_its_own() -> None:
    x = torch.randn(4)

    assert get_recompute(x).is_plain
    assert get_recompute(x).ingredients == (x,)
    assert get_recompute(x).make(x) is x


def test_a_tensor_that_was_changed_is_its_own() -> None:
    x = torch.randn(4)
    y = set_recompute(x.exp(), get_recompute(x).then(torch.exp))
    y.add_(1.0)

    assert get_recompute(y).is_plain
    assert get_recompute(y).ingredients[0] is y


class _Ask(torch.autograd.Function):
    """Passes on; its backward asks, and overwrites what it is told that it may overwrite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, answers: list[bool]) -> Tensor:
        ctx.answers = answers
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        is_ours = can_overwrite(gradient)
        ctx.answers.append(is_ours)
        return gradient.mul_(1) if is_ours else gradient * 1, None


def answers_of(function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], x: Tensor, **options: Any) -> list:
    answers: list[bool] = []
    output = function(x, lambda tensor: _Ask.apply(tensor, answers))
    output.square().sum().backward(**options)
    return answers


def test_a_gradient_that_one_operator_has_made_for_us_is_ours() -> None:
    x = torch.randn(3, requires_grad=True)

    assert answers_of(lambda x, ask: ask(x).exp(), x) == [True]


def test_the_first_of_two_branches_shares_its_gradient() -> None:
    x = torch.randn(3, requires_grad=True)

    first, second = answers_of(lambda x, ask: (ask(x) + ask(2 * x)).exp(), x)

    assert not first
    assert second  # the first one has let go of it


@pytest.mark.parametrize("keep", ["output", "byte", "bit"])
def test_what_our_own_layers_pass_on_is_ours(keep: Kept) -> None:
    x, statistics = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, 4)

    def function(x: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        y = ask(frozen_batch_norm(ask(x), *statistics, 1e-5))
        return clipped_activation(y, torch.relu, upper=float("inf"), keep=keep).exp()

    assert answers_of(function, x) == [True, True]


def test_views_of_one_storage_are_seen() -> None:
    x = torch.randn(3, requires_grad=True)

    assert answers_of(lambda x, ask: torch.cat([ask(x), x]).exp(), x) == [False]


def test_a_hook_that_keeps_the_gradient_is_seen() -> None:
    kept = []

    def function(x: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        y = ask(x)
        y.register_hook(lambda gradient: kept.append(gradient))
        return y.exp()

    assert answers_of(function, torch.randn(3, requires_grad=True)) == [False]


def test_a_captured_gradient_is_seen() -> None:
    x, answers = torch.randn(3, requires_grad=True), []
    y = _Ask.apply(x, answers)

    captured, _ = torch.autograd.grad(y.exp().sum(), [y, x])

    assert answers == [False]
    torch.testing.assert_close(captured, x.exp().detach())


def test_nothing_is_ours_while_the_backward_is_itself_recorded() -> None:
    x, answers = torch.randn(3, requires_grad=True), []

    torch.autograd.grad(_Ask.apply(x, answers).exp().sum(), x, create_graph=True)

    assert answers == [False]


def test_fake_tensors_have_the_same_answers() -> None:
    with FakeTensorMode():
        x = torch.randn(3, requires_grad=True)

        assert answers_of(lambda x, ask: ask(x).exp(), x) == [True]
        assert answers_of(lambda x, ask: (ask(x) + ask(2 * x)).exp(), x) == [False, True]


def test_asking_is_no_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_edge.functional import recompute

    recompute._without_others.cache_clear()
    seen = []

    class Seen(FlopCounterMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    x = torch.randn(3, requires_grad=True)
    with Seen(display=False):
        assert answers_of(lambda x, ask: ask(x).exp(), x) == [True]
        first = len(seen)
        answers_of(lambda x, ask: ask(x).exp(), x)

    # The second time, gradients are added to those of the first.
    assert len(seen) - first - first == sum(func is torch.ops.aten.add_.Tensor for func in seen)
