"""The gated map against a plain product, and what it keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional.activations import smooth_activation
from peft_edge.functional.gating import gated
from peft_edge.functional.recipes import recipe_of


def activated(x: Tensor) -> Tensor:
    return smooth_activation(x, F.silu, torch.ops.aten.silu_backward)


def test_output_and_gradients_are_those_of_the_product() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, gate: Tensor) -> Tensor:
        return gated(activated(x * 1), gate).square()

    torch.testing.assert_close(function(x, gate), (F.silu(x) * gate).square())
    assert torch.autograd.gradcheck(function, (x, gate))
    assert torch.autograd.gradgradcheck(function, (x, gate))


def test_of_an_activation_only_its_input_is_kept() -> None:
    x, gate = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    y = activated(x)

    product = gated(y, gate)

    assert {tensor.data_ptr() for tensor in product.grad_fn.saved_tensors} == {x.data_ptr(), gate.data_ptr()}
    make, ingredients, _ = recipe_of(product)
    assert {tensor.data_ptr() for tensor in ingredients} == {x.data_ptr(), gate.data_ptr()}
    assert torch.equal(make(*ingredients), product)


def test_what_is_no_activation_is_kept_itself() -> None:
    x, gate = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)

    product = gated(x, gate)

    assert {tensor.data_ptr() for tensor in product.grad_fn.saved_tensors} == {x.data_ptr(), gate.data_ptr()}
