"""Test recomputed tensors, and that only gradients without another holder are overwritten."""

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


def test_recompute_returns_the_tensor() -> None:
    x = torch.randn(4)
    y = set_recompute(x.exp(), get_recompute(x).then(torch.exp))

    recompute = get_recompute(y)

    assert not recompute.is_identity
    assert recompute.inputs == (x,)
    assert torch.equal(recompute.function(x), y)
    assert torch.equal(recompute.then(torch.exp).function(x), y.exp())


def test_tensor_without_a_note_recomputes_to_itself() -> None:
    x = torch.randn(4)

    assert get_recompute(x).is_identity
    assert get_recompute(x).inputs == (x,)
    assert get_recompute(x).function(x) is x


def test_tensor_changed_in_place_loses_its_note() -> None:
    x = torch.randn(4)
    y = set_recompute(x.exp(), get_recompute(x).then(torch.exp))
    y.add_(1.0)

    assert get_recompute(y).is_identity
    assert get_recompute(y).inputs[0] is y


class _CheckOverwrite(torch.autograd.Function):
    """The identity. Its backward pass notes whether it can overwrite the gradient, and does so if it can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, results: list[bool]) -> Tensor:
        ctx.results = results
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        overwrites = can_overwrite(gradient)
        ctx.results.append(overwrites)
        return gradient.mul_(1) if overwrites else gradient * 1, None


def can_overwrite_results(function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], x: Tensor) -> list[bool]:
    results: list[bool] = []
    output = function(x, lambda tensor: _CheckOverwrite.apply(tensor, results))
    output.square().sum().backward()
    return results


def test_gradient_of_a_single_branch_can_be_overwritten() -> None:
    x = torch.randn(3, requires_grad=True)

    assert can_overwrite_results(lambda x, check: check(x).exp(), x) == [True]


def test_first_of_two_branches_must_not_overwrite_the_shared_gradient() -> None:
    x = torch.randn(3, requires_grad=True)

    first, second = can_overwrite_results(lambda x, check: (check(x) + check(2 * x)).exp(), x)

    assert not first
    assert second  # the first branch has released it


@pytest.mark.parametrize("keep", ["output", "byte", "bit"])
def test_gradients_from_our_layers_can_be_overwritten(keep: Kept) -> None:
    x, statistics = torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(4, 4)

    def function(x: Tensor, check: Callable[[Tensor], Tensor]) -> Tensor:
        y = check(frozen_batch_norm(check(x), *statistics, 1e-5))
        return clipped_activation(y, torch.relu, upper=float("inf"), keep=keep).exp()

    assert can_overwrite_results(function, x) == [True, True]


def test_gradient_that_shares_its_storage_is_not_overwritten() -> None:
    x = torch.randn(3, requires_grad=True)

    assert can_overwrite_results(lambda x, check: torch.cat([check(x), x]).exp(), x) == [False]


def test_gradient_held_by_a_hook_is_not_overwritten() -> None:
    kept = []

    def function(x: Tensor, check: Callable[[Tensor], Tensor]) -> Tensor:
        y = check(x)
        y.register_hook(lambda gradient: kept.append(gradient))
        return y.exp()

    assert can_overwrite_results(function, torch.randn(3, requires_grad=True)) == [False]


def test_captured_gradient_is_not_overwritten() -> None:
    x, results = torch.randn(3, requires_grad=True), []
    y = _CheckOverwrite.apply(x, results)

    captured, _ = torch.autograd.grad(y.exp().sum(), [y, x])

    assert results == [False]
    torch.testing.assert_close(captured, x.exp().detach())


def test_nothing_is_overwritten_under_create_graph() -> None:
    x, results = torch.randn(3, requires_grad=True), []

    torch.autograd.grad(_CheckOverwrite.apply(x, results).exp().sum(), x, create_graph=True)

    assert results == [False]


def test_fake_tensors_give_the_same_answers() -> None:
    with FakeTensorMode():
        x = torch.randn(3, requires_grad=True)

        assert can_overwrite_results(lambda x, check: check(x).exp(), x) == [True]
        assert can_overwrite_results(lambda x, check: (check(x) + check(2 * x)).exp(), x) == [False, True]


def test_can_overwrite_runs_no_visible_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_edge.functional import recompute

    recompute._counts_of_sole_holder.cache_clear()
    seen = []

    class Seen(FlopCounterMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    x = torch.randn(3, requires_grad=True)
    with Seen(display=False):
        assert can_overwrite_results(lambda x, check: check(x).exp(), x) == [True]
        first = len(seen)
        can_overwrite_results(lambda x, check: check(x).exp(), x)

    # The second run adds its gradients to those of the first.
    assert len(seen) - first - first == sum(func is torch.ops.aten.add_.Tensor for func in seen)
