"""Test the activations and gates against torch's, and what they save for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional import activations
from peft_edge.functional.activations import (
    clipped_activation,
    gated_product,
    make_mask,
    mask_gradient,
    max_pool2d,
    silu_gradient,
    smooth_activation,
)
from peft_edge.functional.recompute import get_recompute, has_standard_layout, set_recompute

SIZES = [(1,), (7,), (8,), (3, 5, 7, 9), (2, 16, 130, 127)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["bit", "byte"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_mask_gradient_keeps_the_gradient_where_the_mask_is_set(
    size: tuple[int, ...], packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "CACHED_ELEMENTS", 1000)
    x, gradient = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)

    mask = make_mask(x, lambda part: part > 0.3, packed=packed)
    result = mask_gradient(gradient, mask, torch.empty_like(gradient))

    assert mask.dtype == torch.uint8
    assert mask.numel() == (-(-x.numel() // 8) if packed else x.numel())
    assert torch.equal(result, torch.where(x > 0.3, gradient, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("packed", [True, False], ids=["bit", "byte"])
def test_mask_follows_the_memory_order_of_channels_last(packed: bool) -> None:
    x = torch.randn(2, 5, 6, 3).to(memory_format=torch.channels_last)
    gradient = torch.randn(2, 5, 6, 3).to(memory_format=torch.channels_last)
    expected = torch.where(x > 0, gradient, torch.zeros(()))

    mask_gradient(gradient, make_mask(x, lambda part: part > 0, packed=packed), out=gradient)

    assert torch.equal(gradient, expected)


def test_masked_infinite_gradients_become_zero() -> None:
    gradient = torch.tensor([float("inf"), float("nan"), float("inf")])
    mask = make_mask(torch.tensor([1.0, -1.0, -1.0]), lambda part: part > 0, packed=True)

    assert mask_gradient(gradient, mask, torch.empty(3)).tolist() == [float("inf"), 0.0, 0.0]


def test_has_standard_layout_rejects_gaps_and_permutations() -> None:
    x = torch.zeros(2, 4, 6, 8)

    assert has_standard_layout(x)
    assert has_standard_layout(x.to(memory_format=torch.channels_last))
    assert has_standard_layout(torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d))
    assert has_standard_layout(torch.zeros(()))
    assert not has_standard_layout(x[:, :2])
    assert not has_standard_layout(x.permute(1, 0, 2, 3))
    assert not has_standard_layout(torch.zeros(1).expand(4))


CLIPPED = {
    "relu": (F.relu, float("inf")),
    "relu6": (F.relu6, 6.0),
}
SMOOTH = {
    "hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
    "silu": (F.silu, silu_gradient),
}
KEPT = ["output", "byte", "bit"]


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    # The product before it is a tensor to overwrite. The product after it makes a gradient that nothing else holds.
    y = function(leaf * 1)
    (y * seed).sum().backward()
    return y.detach(), leaf.grad


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_clipped_activations_are_bit_identical_to_torch(
    name: str, keep: str, inplace: bool, memory_format: torch.memory_format
) -> None:
    plain, upper = CLIPPED[name]
    # Whole numbers hit both ends of the range exactly.
    x = (5 * torch.randn(3, 5, 7, 9)).round(decimals=0).to(memory_format=memory_format)
    seed = torch.randn(x.shape)  # contiguous, unlike x
    expected = gradient_of(plain, x, seed)

    found = gradient_of(
        lambda x: clipped_activation(x, plain, keep=keep, upper=upper, inplace=inplace),
        x,
        seed,
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_are_bit_identical_to_torch(name: str) -> None:
    plain, backward = SMOOTH[name]
    x, seed = 3 * torch.randn(3, 5, 7, 9), torch.randn(3, 5, 7, 9)

    found, expected = (
        gradient_of(function, x, seed) for function in (lambda x: smooth_activation(x, plain, backward), plain)
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("is_recomputed", [True, False])
def test_smooth_activation_in_place_equals_torch(is_recomputed: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *, plain: bool = False) -> Tensor:
        y = _noted_double(x) if is_recomputed and not plain else x * 2
        z = F.silu(y, inplace=True) if plain else smooth_activation(y, F.silu, silu_gradient, inplace=True)
        return y + z.square()  # y and z are the same tensor

    found, expected = function(x), function(x, plain=True)

    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(value.sum(), x)[0] for value in (found, expected)))
    assert torch.autograd.gradgradcheck(function, x)


def _noted_double(x: Tensor) -> Tensor:
    return set_recompute(x * 2, get_recompute(x).then(lambda x, overwrite: x * 2))


@pytest.mark.parametrize("keep", KEPT)
def test_clipped_activations_have_second_derivatives(keep: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return clipped_activation(x * 2, F.relu6, upper=6.0, keep=keep).square()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_smooth_activations_have_second_derivatives() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return smooth_activation(x, F.silu, silu_gradient)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(("keep", "bits"), [("output", 32), ("byte", 8), ("bit", 1)])
def test_clipped_activation_saves_the_bits_it_claims(keep: str, bits: int) -> None:
    x = torch.randn(4, 8, 10, 10, requires_grad=True)

    y = clipped_activation(x, F.relu, upper=float("inf"), keep=keep)

    (kept,) = y.grad_fn.saved_tensors
    assert 8 * kept.numel() * kept.element_size() == bits * x.numel()


def test_output_with_gaps_is_saved_without_a_mask() -> None:
    x = torch.randn(4, 8, 10, 10)
    seed = torch.randn(4, 4, 10, 10)
    expected = gradient_of(lambda x: F.relu(x[:, ::2]), x, seed)

    found = gradient_of(
        lambda x: clipped_activation(x[:, ::2], F.relu, upper=float("inf"), keep="bit", inplace=True),
        x,
        seed,
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("keep", KEPT)
def test_gradient_held_by_a_hook_is_not_overwritten(keep: str) -> None:
    x, held = torch.randn(64, requires_grad=True), []

    y = clipped_activation(x * 1, F.relu, upper=float("inf"), keep=keep)
    y.register_hook(lambda gradient: held.append(gradient))
    y.exp().sum().backward()

    torch.testing.assert_close(held[0], y.exp().detach())
    torch.testing.assert_close(x.grad, torch.where(x > 0, x.exp(), torch.zeros(())).detach())


def activated(x: Tensor) -> Tensor:
    return smooth_activation(x, F.silu, silu_gradient)


def test_gated_product_has_output_and_gradients_of_the_product() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, gate: Tensor) -> Tensor:
        return gated_product(activated(x * 1), gate).square()

    torch.testing.assert_close(function(x, gate), (F.silu(x) * gate).square())
    assert torch.autograd.gradcheck(function, (x, gate))
    assert torch.autograd.gradgradcheck(function, (x, gate))


def test_gated_product_of_an_activation_saves_the_input_of_the_activation() -> None:
    x, gate = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    y = activated(x)

    product = gated_product(y, gate)

    assert {tensor.data_ptr() for tensor in product.grad_fn.saved_tensors} == {x.data_ptr(), gate.data_ptr()}
    node, inputs = get_recompute(product)
    assert {tensor.data_ptr() for tensor in inputs} == {x.data_ptr(), gate.data_ptr()}
    assert torch.equal(node.value(inputs), product)


def test_gated_product_of_another_tensor_saves_the_tensor() -> None:
    x, gate = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)

    product = gated_product(x, gate)

    assert {tensor.data_ptr() for tensor in product.grad_fn.saved_tensors} == {x.data_ptr(), gate.data_ptr()}


def test_max_pool_saves_the_input_of_the_activation_and_equals_torch() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    options = ((3, 3), (2, 2), (1, 1), (1, 1), True)
    seed = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    y = max_pool2d(activated(x * 1), *options)
    expected = F.max_pool2d(F.silu(x), *options)

    assert torch.equal(y, expected)
    (saved,) = y.grad_fn.saved_tensors
    assert torch.equal(saved, x)
    gradients = [torch.autograd.grad(output, x, seed)[0] for output in (y, expected)]
    torch.testing.assert_close(*gradients)


def test_max_pool_has_second_derivatives() -> None:
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradgradcheck(lambda x: max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False).square(), x)
