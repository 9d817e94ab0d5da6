"""Lean activations against torch's, and what they keep by counting bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional.activations import clipped_activation, smooth_activation

CLIPPED = {
    "relu": (F.relu, float("inf")),
    "relu6": (F.relu6, 6.0),
}
SMOOTH = {
    "hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}
KEPT = ["output", "byte", "bit"]


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    # A product before it, so that in-place forms have something to overwrite, and one after, so that the gradient is
    # nobody else's.
    y = function(leaf * 1)
    (y * seed).sum().backward()
    return y.detach(), leaf.grad


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_clipped_activations_are_torchs_to_the_bit(
    name: str, keep: str, inplace: bool, memory_format: torch.memory_format
) -> None:
    plain, upper = CLIPPED[name]
    # Whole numbers among them, so that both ends of the line are met exactly.
    x = (5 * torch.randn(3, 5, 7, 9)).round(decimals=0).to(memory_format=memory_format)
    seed = torch.randn(x.shape)  # contiguous: not the format of x
    expected = gradient_of(plain, x, seed)

    found = gradient_of(
        lambda x: clipped_activation(x, lambda x: plain(x, inplace=inplace), keep=keep, upper=upper, inplace=inplace),
        x,
        seed,
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_are_torchs_to_the_bit(name: str) -> None:
    plain, backward = SMOOTH[name]
    x, seed = 3 * torch.randn(3, 5, 7, 9), torch.randn(3, 5, 7, 9)

    found, expected = (
        gradient_of(function, x, seed) for function in (lambda x: smooth_activation(x, plain, backward), plain)
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("keep", KEPT)
def test_clipped_activations_can_be_differentiated_twice(keep: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return clipped_activation(x * 2, F.relu6, upper=6.0, keep=keep).square()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_smooth_activations_can_be_differentiated_twice() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return smooth_activation(x, F.silu, torch.ops.aten.silu_backward)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(("keep", "bits"), [("output", 32), ("byte", 8), ("bit", 1)])
def test_what_a_clipped_activation_keeps(keep: str, bits: int) -> None:
    x = torch.randn(4, 8, 10, 10, requires_grad=True)

    y = clipped_activation(x, F.relu, upper=float("inf"), keep=keep)

    (kept,) = y.grad_fn.saved_tensors
    assert 8 * kept.numel() * kept.element_size() == bits * x.numel()


def test_an_output_with_gaps_is_kept_itself() -> None:
    x = torch.randn(4, 8, 10, 10)
    seed = torch.randn(4, 4, 10, 10)
    expected = gradient_of(lambda x: F.relu(x[:, ::2]), x, seed)

    found = gradient_of(
        lambda x: clipped_activation(
            x[:, ::2], lambda x: F.relu(x, inplace=True), upper=float("inf"), keep="bit", inplace=True
        ),
        x,
        seed,
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("keep", KEPT)
def test_a_gradient_that_others_hold_is_left_alone(keep: str) -> None:
    x, held = torch.randn(64, requires_grad=True), []

    y = clipped_activation(x * 1, F.relu, upper=float("inf"), keep=keep)
    y.register_hook(lambda gradient: held.append(gradient))
    y.exp().sum().backward()

    torch.testing.assert_close(held[0], y.exp().detach())
    torch.testing.assert_close(x.grad, torch.where(x > 0, x.exp(), torch.zeros(())).detach())
