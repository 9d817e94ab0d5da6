"""Test convolutions against torch's layers, and their gradients against autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from peft_edge.functional.convolution import (
    Geometry,
    convolution,
    input_gradient,
    kernel_gradient,
    lean_convolution,
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
def test_pad_and_convolution_equal_the_layer(kind: str) -> None:
    conv = CONVS[kind]().double()
    x = _input(conv, dtype=torch.float64)

    torch.testing.assert_close(convolution(*_arguments(conv, x)), conv(x))


def _arguments(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    padded, geometry = pad(conv, x)
    return padded, conv.weight, conv.bias, geometry


@pytest.mark.parametrize("kind", ["dense", "same", "valid", "pointwise", "conv1d"])
def test_pad_returns_the_input_for_zero_padding(kind: str) -> None:
    conv = CONVS[kind]()
    x = _input(conv)

    assert pad(conv, x)[0] is x


@pytest.mark.parametrize("kind", CONVS)
def test_gradients_equal_autograd(kind: str) -> None:
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
@pytest.mark.parametrize("trained", [False, True])
def test_lean_convolution_equals_the_layer(kind: str, trained: bool) -> None:
    conv = CONVS[kind]().double().requires_grad_(trained)
    x = _input(conv, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(parameter for parameter in conv.parameters() if trained)]

    y, expected = lean_convolution(*_arguments(conv, x)), conv(x)

    assert torch.equal(y, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(output.square().sum(), tensors) for output in (y, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["strided", "depthwise", "conv1d"])
@pytest.mark.parametrize("trained", [False, True])
def test_first_and_second_derivatives_equal_finite_differences(kind: str, trained: bool) -> None:
    conv = CONVS[kind]().double().requires_grad_(trained)
    x = _input(conv, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        return lean_convolution(*_arguments(conv, x)).square()

    tensors = (x, *(parameter for parameter in conv.parameters() if trained))
    assert torch.autograd.gradcheck(forward, tensors)
    assert torch.autograd.gradgradcheck(forward, tensors)


@pytest.mark.parametrize("kind", ["dense", "pointwise", "depthwise"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_preserved(kind: str, memory_format: torch.memory_format) -> None:
    conv = CONVS[kind]().to(memory_format=memory_format)
    x = _input(conv).to(memory_format=memory_format).requires_grad_()

    y = lean_convolution(*_arguments(conv, x))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))

    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_runs_in_half_precision(inside: bool) -> None:
    conv = CONVS["dense"]()
    x = _input(conv, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lean_convolution(*_arguments(conv, x))
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
        # A new tensor, because the caller keeps the model's input alive.
        return lean_convolution(*_arguments(self.conv, x * 2))


def test_frozen_convolution_does_not_save_its_input() -> None:
    model, x = _Frozen(CONVS["pointwise"]()), torch.randn(2, 4, 9, 9, requires_grad=True)
    with MemoryTracker(model, inputs=x) as tracker:
        model(x).sum().backward()

    memory = tracker.result()
    y_bytes, scalar_bytes = 2 * 6 * 9 * 9 * 4, 4
    # The backward pass of a sum needs only the shape of its input, so only x and y are alive after the forward pass.
    assert memory.forward_end["activations"] <= x.nbytes + y_bytes + scalar_bytes
    # The gradients of y and of the doubled x, and one temporary gradient.
    assert memory.peak_bytes <= memory.start_bytes + 2 * x.nbytes + y_bytes + 100


@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_backward_flops_equal_forward_flops(kind: str) -> None:
    model, x = _Frozen(CONVS[kind]()), torch.randn(2, 4, 9, 8, requires_grad=True)
    with FlopCounter(model) as counter:
        model(x).sum().backward()

    flops = counter.result()
    assert flops.backward == flops.forward == 2 * model.conv.weight[0].numel() * model.conv(x).numel()


@pytest.mark.parametrize("kind", ["strided", "depthwise", "conv3d"])
def test_fake_tensors_have_the_shapes_of_real_ones(kind: str) -> None:
    conv = CONVS[kind]()
    x = _input(conv)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        y = lean_convolution(*_arguments(conv, fake))
        (grad,) = torch.autograd.grad(y.sum(), fake)

    assert (y.shape, grad.shape) == (conv(x).shape, x.shape)


@pytest.mark.slow
def test_frozen_convolution_compiles_and_exports_as_one_graph() -> None:
    model, x = _Frozen(CONVS["depthwise"]()), torch.randn(2, 4, 9, 8, requires_grad=True)
    expected = model(x)

    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)

    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)
    program = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), expected)
