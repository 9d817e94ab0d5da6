"""Test the low-rank convolution with autocast, checkpointing, fake tensors, compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peft_edge.functional.lowrank import GradientRoute
from peft_edge.profiling import FlopCounter
from tests.functional.support import Case, gradients_of, make_case


@pytest.mark.parametrize("route", ["full_kernel", "low_rank"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_preserved_for_a_contiguous_gradient(
    memory_format: torch.memory_format, route: GradientRoute
) -> None:
    case = make_case("dense", torch.float32)
    x = case.x.detach().to(memory_format=memory_format).requires_grad_()
    y = case._replace(x=x).run(route=route)
    # The gradient of a pooled map is contiguous, or expanded without strides.
    (grad,) = torch.autograd.grad(y.mean((2, 3)).sum(), x)

    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("trains_a", [False, True])
@pytest.mark.parametrize("route", ["full_kernel", "low_rank"])
def test_autocast_gradients_are_close_to_single_precision(route: GradientRoute, trains_a: bool, inside: bool) -> None:
    case = make_case("dense", torch.float32, lora_a=trains_a, magnitude=False)
    expected = gradients_of(case.run(), case)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(route=route)
        got = gradients_of(y, case) if inside else None
    got = got or gradients_of(y, case)

    assert y.dtype == torch.bfloat16
    for gradient, wanted in zip(got, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.03 * wanted.norm()


def test_half_precision_layer_takes_a_single_precision_adapter() -> None:
    case = make_case("dense", torch.float32)
    half = case._replace(**{name: getattr(case, name).detach().bfloat16() for name in ("x", "weight", "bias")})

    for route in ("full_kernel", "low_rank"):
        y = half.run(route=route)
        grads = torch.autograd.grad(y.sum(), [case.lora_a, case.lora_b])
        assert (y.dtype, {grad.dtype for grad in grads}) == (torch.bfloat16, {torch.float32})


def test_half_precision_layer_and_adapter_take_a_single_precision_magnitude() -> None:
    case = make_case("dense", torch.float32)
    names = ("x", "weight", "lora_a", "lora_b", "bias")
    half = case._replace(**{name: getattr(case, name).detach().bfloat16().requires_grad_() for name in names})
    half.weight.requires_grad_(False)

    for dora, route in ((False, "full_kernel"), (False, "low_rank"), (True, "full_kernel")):
        y = half.run(dora=dora, route=route)
        grads = torch.autograd.grad(y.sum(), [half.lora_a, half.lora_b])
        assert {y.dtype, *(grad.dtype for grad in grads)} == {torch.bfloat16}


@pytest.mark.parametrize("trains_a", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, trains_a: bool) -> None:
    case = make_case("strided", lora_a=trains_a, magnitude=False)
    expected = gradients_of(case.run(), case)

    checkpoint(lambda x: case._replace(x=x).run(), case.x, use_reentrant=use_reentrant).square().sum().backward()

    got = [value.grad for value in case[1:] if value.requires_grad]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["strided", "depthwise"])
def test_fake_tensors_have_the_shapes_of_real_ones(kind: str) -> None:
    case = make_case(kind)
    with FakeTensorMode() as mode:
        fake = Case(case.geometry, *[mode.from_tensor(value) for value in case[1:]])
        y = fake.run(dora=True)
        grads = gradients_of(y, fake)

    assert y.shape == case.run().shape
    assert [grad.shape for grad in grads] == [value.shape for value in case[1:] if value.requires_grad]


class _Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.lora_a, self.lora_b = case, nn.Parameter(case.lora_a), nn.Parameter(case.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        return self.case._replace(x=x, lora_a=self.lora_a, lora_b=self.lora_b).run()


def test_inference_runs_one_plain_convolution() -> None:
    case = make_case("dense", lora_a=False, magnitude=False, bias=False)
    with FlopCounter(_Layer(case)) as counter, torch.no_grad():
        y = case.run()

    assert y.grad_fn is None
    assert counter.result().by_operator["aten.convolution"].forward == 2 * 4 * 9 * y.numel()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_trace_contains_plain_operators_only() -> None:
    case = make_case("strided", bias=False, magnitude=False)
    x = case.x.detach()

    traced = torch.jit.trace(_Layer(case), x)

    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), case.run())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strided", "depthwise"])
@pytest.mark.parametrize("trains_a", [False, True])
def test_lowrank_convolution_compiles_and_exports_as_one_graph(kind: str, trains_a: bool) -> None:
    case = make_case(kind, magnitude=False, bias=False)
    model = _Layer(case)
    model.lora_a.requires_grad_(trains_a)
    x = case.x.detach().requires_grad_()
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    make: list[Callable[..., Any]] = [model, torch.compile(model, backend="aot_eager", fullgraph=True)]

    outputs = [run(x) for run in make]
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in outputs]

    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    program = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), outputs[0])
    assert "convolution" in str(program.graph) or "conv2d" in str(program.graph)
