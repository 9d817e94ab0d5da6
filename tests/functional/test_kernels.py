"""The kernel arithmetic against convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_edge.functional.kernels import as_kernel, as_matrix, dora_scale, lowrank_kernel

FORMATS = [
    (torch.Size([8, 3, 2, 5]), torch.contiguous_format),
    (torch.Size([8, 3, 2, 5]), torch.channels_last),
    (torch.Size([8, 3, 2, 5, 4]), torch.channels_last_3d),
]


def test_dense_kernel_is_the_chain_of_two_convolutions() -> None:
    x, a, b = (torch.randn(shape, dtype=torch.float64) for shape in [(2, 3, 9, 9), (4, 3, 3, 3), (8, 4, 1, 1)])

    kernel = lowrank_kernel(a, b, 0.5, torch.Size([8, 3, 3, 3]))

    torch.testing.assert_close(F.conv2d(x, kernel, stride=2), 0.5 * F.conv2d(F.conv2d(x, a, stride=2), b))


def test_depthwise_kernel_mixes_shared_spatial_kernels() -> None:
    a, b = torch.randn(2, 1, 3, 3), torch.randn(6, 2, 1, 1)

    kernel = lowrank_kernel(a, b, 2.0, torch.Size([6, 1, 3, 3]))

    for channel in range(6):
        expected = 2.0 * (b[channel, 0] * a[0] + b[channel, 1] * a[1])
        torch.testing.assert_close(kernel[channel], expected)


@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_a_kernel_comes_in_the_memory_format_of_another(shape: torch.Size, memory_format: torch.memory_format) -> None:
    a, b = torch.randn(4, *shape[1:]), torch.randn(8, 4, *[1] * (len(shape) - 2))

    kernel = lowrank_kernel(a, b, 0.5, shape, memory_format)

    assert kernel.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(kernel, 0.5 * torch.einsum("or,r...->o...", b.flatten(1), a))


@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_a_kernel_and_its_matrix_are_views_of_each_other(shape: torch.Size, memory_format: torch.memory_format) -> None:
    kernel = torch.randn(shape).to(memory_format=memory_format)

    matrix = as_matrix(kernel, memory_format)

    assert matrix.shape == (8, kernel[0].numel())
    assert matrix.data_ptr() == kernel.data_ptr()
    assert torch.equal(as_kernel(matrix, shape, memory_format), kernel)


def test_dora_scale_gives_each_channel_its_length_and_no_gradient_to_the_norm() -> None:
    kernel = torch.randn(5, 3, 2, 2, requires_grad=True)
    magnitude = torch.rand(1, 5, 1, 1, requires_grad=True)

    scaled = kernel * dora_scale(kernel, magnitude)
    scaled.sum().backward()

    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), magnitude.flatten())
    length = kernel.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(kernel.grad, (magnitude.flatten() / length).view(5, 1, 1, 1).expand_as(kernel).detach())
    torch.testing.assert_close(magnitude.grad.flatten(), kernel.detach().flatten(1).sum(1) / length)


def test_dora_scale_keeps_a_zero_channel_zero() -> None:
    kernel = torch.zeros(2, 3, 1, 1)

    assert (kernel * dora_scale(kernel, torch.zeros(2)) == 0).all()
