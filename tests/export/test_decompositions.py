"""Decomposed gradients against autograd's own, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft_edge.export.decompositions import decompositions

aten = torch.ops.aten
TABLE = decompositions()


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (1, 2, 0, 1), (1, 1, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (3, 2, 0, 1), (5, 3, 2, 1)],
)
@pytest.mark.parametrize("size", [(12, 9), (7, 8)])
def test_gradients_of_a_convolution(
    size: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    x = torch.randn(3, 8, *size, dtype=torch.float64)
    weight = torch.randn(16, 8 // groups, kernel, kernel, dtype=torch.float64)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups)
    grad = torch.randn_like(aten.convolution.default(x, weight, None, *geometry))
    arguments = (grad, x, weight, [16], *geometry, [True, True, True])
    expected = aten.convolution_backward.default(*arguments)
    for found, gradient in zip(TABLE[aten.convolution_backward.default](*arguments), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.hardswish, F.hardsigmoid])
def test_gradients_of_activations(activation: object) -> None:
    x = torch.tensor([-4.0, -3, -1, 0, 1, 3, 5, 6, 7], dtype=torch.float64, requires_grad=True)  # with the kinks
    grad = torch.randn_like(x)
    y = activation(x)
    (expected,) = torch.autograd.grad(y, x, grad)
    x = x.detach()
    found = {
        F.relu: lambda: TABLE[aten.threshold_backward.default](grad, y.detach(), 0),
        F.relu6: lambda: TABLE[aten.hardtanh_backward.default](grad, x, 0, 6),
        F.hardswish: lambda: TABLE[aten.hardswish_backward.default](grad, x),
        F.hardsigmoid: lambda: TABLE[aten.hardsigmoid_backward.default](grad, x),
    }[activation]()
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_gradient_of_an_average_pool(kernel: int, stride: int) -> None:
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    arguments = (x, [kernel], [stride], [0], False, True, None)
    grad = torch.randn_like(F.avg_pool2d(x, kernel, stride))
    expected = aten.avg_pool2d_backward.default(grad, *arguments)
    torch.testing.assert_close(TABLE[aten.avg_pool2d_backward.default](grad, *arguments), expected)


def test_gradients_without_a_decomposition_are_refused() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="average pool with padding"):
        TABLE[aten.avg_pool2d_backward.default](x, x, [3], [1], [1], False, True, None)
    with pytest.raises(NotImplementedError, match="transposed convolution"):
        TABLE[aten.convolution_backward.default](x, x, x, None, [1], [0], [1], True, [0], 1, [True, True, False])
