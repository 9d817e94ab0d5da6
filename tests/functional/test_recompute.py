"""Test recomputed tensors, and that only gradients without another holder are overwritten."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft_edge.functional import recompute
from peft_edge.functional.activations import Kept, clipped_activation
from peft_edge.functional.batch_norm import frozen_batch_norm
from peft_edge.functional.recompute import can_overwrite, get_recompute, set_recompute


def _exp(x: Tensor, *, overwrite: bool) -> Tensor:
    return x.exp_() if overwrite else x.exp()


def noted(x: Tensor, **options: bool) -> Tensor:
    """Return exp(x), and store with the result that it can be recomputed from x."""
    return set_recompute(x.exp(), get_recompute(x).then(_exp, **options))


def test_recompute_returns_the_tensor_and_keeps_its_inputs() -> None:
    x = torch.randn(4)
    before, y = x.clone(), noted(noted(x))

    node, inputs = get_recompute(y)

    assert not node.is_identity
    assert inputs[0] is x
    with torch.no_grad():
        assert torch.equal(node.value(inputs), y)
        assert torch.equal(node.value(inputs), y)
    assert torch.equal(x, before)


def test_tensor_without_a_note_recomputes_to_itself() -> None:
    x = torch.randn(4)

    node, inputs = get_recompute(x)

    assert node.is_identity
    assert inputs == (x,)
    assert node.value(inputs) is x


def test_tensor_changed_in_place_loses_its_note() -> None:
    y = noted(torch.randn(4))
    y.add_(1.0)

    assert get_recompute(y).is_identity
    assert get_recompute(y).inputs[0] is y


def test_note_from_outside_a_checkpoint_is_ignored_inside() -> None:
    y = noted(torch.randn(4, requires_grad=True))
    found = []

    def block(y: Tensor) -> Tensor:
        found.append(get_recompute(y))
        return y.sin()

    checkpoint(block, y, use_reentrant=False).sum().backward()

    assert [source.is_identity for source in found] == [True, True]  # the forward pass and its repetition


def test_note_is_neither_copied_nor_pickled() -> None:
    y = noted(torch.randn(4))
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)

    for other in (torch.load(file), copy.deepcopy(y)):
        assert torch.equal(other, y)
        assert get_recompute(other).is_identity


def test_batches_hold_the_recomputed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CACHED_ELEMENTS", 10)
    x, small, large = torch.randn(7, 4, 2), torch.randn(7, 3), torch.randn(7, 9)
    y = noted(x, is_pointwise=True)
    node, inputs = get_recompute(y)

    with torch.no_grad():
        batches, single = list(node.batches(inputs, small)), list(node.batches(inputs, large))

    assert [len(part) for part, _ in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([part for part, _ in batches]), y)
    assert torch.equal(torch.cat([other for _, other in batches]), small)
    assert [len(part) for part, _ in single] == [7]  # no batches if x is smaller than another tensor


def test_recomputed_convolution_is_cached_until_its_last_user() -> None:
    calls = []

    def convolve(x: Tensor, *, overwrite: bool) -> Tensor:
        calls.append(overwrite)
        return x * 2

    x = torch.randn(4)
    z = set_recompute(x * 2, get_recompute(x).then(convolve, is_convolution=True))
    node, inputs = get_recompute(noted(z))
    users = [node.add_user(), get_recompute(z).node.add_user(), node.add_user()]

    with torch.no_grad():
        results = [user.value(inputs).clone() for user in users]
        assert len(calls) == 1
        users[0].value(inputs)  # as in a second backward pass over the same graph
    assert len(calls) == 2
    assert torch.equal(results[0], (x * 2).exp())
    assert torch.equal(results[1], x * 2)
    assert torch.equal(results[2], (x * 2).exp())


def test_chain_of_recomputed_convolutions_is_short() -> None:
    y = torch.randn(4)
    for _ in range(3):
        y = set_recompute(y * 2, get_recompute(y).then(lambda x, overwrite: x * 2, is_convolution=True))

    assert get_recompute(y).is_identity


class _CheckOverwrite(torch.autograd.Function):
    """The identity function. Its backward pass appends to `results` whether it may overwrite the gradient.

    If it may, the backward pass computes its result in place.
    """

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
        return clipped_activation(y, F.relu, upper=float("inf"), keep=keep).exp()

    assert can_overwrite_results(function, x) == [True, True]


def test_autograd_still_adds_gradients_in_place() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x * 2
    loss = ((_CheckOverwrite.apply(y, []) + y) * torch.ones(3)).sum()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss.backward()

    assert "aten::add_" in {event.key for event in profiler.key_averages()}


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


@pytest.mark.parametrize("hidden", [(2,), (0, 1, 2)], ids=["storage", "all"])
def test_nothing_is_overwritten_if_the_counts_do_not_reveal_a_holder(
    hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = recompute._reference_counts
    assert can_overwrite_results(lambda x, check: check(x).exp(), torch.randn(3, requires_grad=True)) == [True]

    def without_hidden(gradient: Tensor) -> tuple[int, ...]:
        return tuple(0 if kind in hidden else count for kind, count in enumerate(counts(gradient)))

    monkeypatch.setattr(recompute, "_reference_counts", without_hidden)
    recompute._counts_of_sole_holder.cache_clear()
    try:
        found = can_overwrite_results(lambda x, check: check(x).exp(), torch.randn(3, requires_grad=True))
    finally:
        recompute._counts_of_sole_holder.cache_clear()

    assert found == [False]


def test_can_overwrite_runs_no_visible_operators(monkeypatch: pytest.MonkeyPatch) -> None:
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
