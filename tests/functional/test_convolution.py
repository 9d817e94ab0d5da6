"""Convolutions with plain geometry against torch's layers, and their gradients against autograd's.

The kernel arithmetic against convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from peft_edge.functional.convolution import (
    Geometry,
    as_kernel,
    as_matrix,
    convolution,
    dora_scale,
    frozen_convolution,
    input_gradient,
    kernel_gradient,
    lowrank_kernel,
    pad,
)
from peft_edge.profiling import FlopCounter, MemoryTracker

CONVS: dict[str, Callable[[], nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "dense": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, stride=(2, 3)),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "wide padding": lambda: nn.Conv2d(4, 6, 1, stride=2, padding=2),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
    "timm same": lambda: Conv2dSame(4, 6, 3, stride=2),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "same, even": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2),
    "depthwise with multiplier": lambda: nn.Conv2d(4, 8, (1, 5), groups=4, stride=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2, stride=3),
    "conv3d": lambda: nn.Conv3d(4, 4, (1, 3, 3), groups=4, padding=(0, 1, 1)),
}


def _input(conv: nn.Module, **options: object) -> Tensor:
    return torch.randn(2, 4, *[9, 8, 7][: len(conv.kernel_size)], **options)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", CONVS)
def test_padding_and_geometry_are_the_layers(kind: str) -> None:
    conv = CONVS[kind]().double()
    x = _input(conv, dtype=torch.float64)

    torch.testing.assert_close(convolution(*_arguments(conv, x)), conv(x))


def _arguments(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    padded, geometry = pad(conv, x)
    return padded, conv.weight, conv.bias, geometry


@pytest.mark.parametrize("kind", ["dense", "same", "valid", "pointwise", "conv1d"])
def test_plain_zero_padding_copies_nothing(kind: str) -> None:
    conv = CONVS[kind]()
    x = _input(conv)

    assert pad(conv, x)[0] is x


@pytest.mark.parametrize("kind", CONVS)
def test_gradients_are_autograds(kind: str) -> None:
    conv = CONVS[kind]().double()
    x, weight, bias, geometry = _arguments(conv, _input(conv, dtype=torch.float64))
    x = x.detach().requires_grad_()
    y = convolution(x, weight, bias, geometry)
    grad_output = torch.randn_like(y)

    expected_x, expected_weight = torch.autograd.grad(y, [x, weight], grad_output)

    torch.testing.assert_close(input_gradient(grad_output, weight, x.shape, geometry), expected_x)
    torch.testing.assert_close(kernel_gradient(grad_output, x, weight.shape, geometry), expected_weight)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", CONVS)
def test_frozen_convolution_equals_the_layer(kind: str) -> None:
    conv = CONVS[kind]().double()
    x = _input(conv, dtype=torch.float64, requires_grad=True)

    y = frozen_convolution(*_arguments(conv, x))
    y.square().sum().backward()

    assert conv.weight.grad is None
    grad, x.grad = x.grad, None
    expected = conv(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("kind", ["strided", "depthwise", "conv1d"])
def test_first_and_second_derivatives_equal_finite_differences(kind: str) -> None:
    conv = CONVS[kind]().double().requires_grad_(False)
    x = _input(conv, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return frozen_convolution(*_arguments(conv, x)).square()

    assert torch.autograd.gradcheck(forward, (x,))
    assert torch.autograd.gradgradcheck(forward, (x,))


@pytest.mark.parametrize("kind", ["dense", "pointwise", "depthwise"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_stays(kind: str, memory_format: torch.memory_format) -> None:
    conv = CONVS[kind]().to(memory_format=memory_format)
    x = _input(conv).to(memory_format=memory_format).requires_grad_()

    y = frozen_convolution(*_arguments(conv, x))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))

    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    conv = CONVS["dense"]()
    x = _input(conv, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_convolution(*_arguments(conv, x))
        if inside:
            y.sum().backward()
    if not inside:
        y.sum().backward()

    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(conv(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, atol=0.02, rtol=0.02)


class _Frozen(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        # Not the model's input: that one is the caller's, and stays.
        return frozen_convolution(*_arguments(self.conv, x * 2))


def test_input_is_not_kept() -> None:
    model, x = _Frozen(CONVS["pointwise"]()), torch.randn(2, 4, 9, 9, requires_grad=True)
    with MemoryTracker(model, inputs=x) as tracker:
        model(x).sum().backward()

    memory = tracker.result()
    y_bytes, scalar_bytes = 2 * 6 * 9 * 9 * 4, 4
    # The sum's input is its output's shape alone, so that what is left at the end of the forward pass is x and y.
    assert memory.forward_end["activations"] <= x.nbytes + y_bytes + scalar_bytes
    # The gradients of y and of the doubled x, and one gradient that has just become another.
    assert memory.peak_bytes <= memory.start_bytes + 2 * x.nbytes + y_bytes + 100


@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_flops_of_the_backward_are_those_of_the_forward(kind: str) -> None:
    model, x = _Frozen(CONVS[kind]()), torch.randn(2, 4, 9, 8, requires_grad=True)
    with FlopCounter(model) as counter:
        model(x).sum().backward()

    flops = counter.result()
    assert flops.backward == flops.forward == 2 * model.conv.weight[0].numel() * model.conv(x).numel()


@pytest.mark.parametrize("kind", ["strided", "depthwise", "conv3d"])
def test_fake_tensors(kind: str) -> None:
    conv = CONVS[kind]()
    x = _input(conv)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        y = frozen_convolution(*_arguments(conv, fake))
        (grad,) = torch.autograd.grad(y.sum(), fake)

    assert (y.shape, grad.shape) == (conv(x).shape, x.shape)


@pytest.mark.slow
def test_compiles_and_exports_as_one_graph() -> None:
    model, x = _Frozen(CONVS["depthwise"]()), torch.randn(2, 4, 9, 8, requires_grad=True)
    expected = model(x)

    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)

    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)
    program = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), expected)


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
