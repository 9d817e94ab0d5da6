"""Test the low-rank convolution against autograd and finite differences, and the arithmetic of its kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_edge.functional import lowrank
from peft_edge.functional.lowrank import (
    GradientRoute,
    as_kernel,
    as_matrix,
    choose_gradient_route,
    dora_scale,
    lowrank_keeps_input,
    lowrank_kernel,
)
from peft_edge.profiling import FlopCounter
from tests.functional.support import KINDS, gradients_of, make_case


def _map(channels: int, size: int) -> Tensor:
    return torch.empty(16, channels, size, size, device="meta").to(memory_format=torch.channels_last)


def _chosen(c_in: int, c_out: int, size: int, kernel: int = 1, groups: int = 1, rank: int = 4) -> str:
    weight_size = torch.Size([c_out, c_in // groups, kernel, kernel])
    return choose_gradient_route(_map(c_in, size), _map(c_out, size), weight_size, rank)


@pytest.fixture(autouse=True)
def meta_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the routes of tensors on the meta device with the speeds of the CPU.

    Tensors on the meta device can thus stand for large layers on a CPU, and take no memory.
    """
    monkeypatch.setitem(lowrank._SPEEDS, "meta", lowrank._SPEEDS["cpu"])


@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "expected"),
    [
        # mobilenetv2_100 at 224 px, batch 16, as measured on one core.
        (32, 16, 112, "full_kernel"),
        (16, 96, 112, "full_kernel"),
        (96, 24, 56, "full_kernel"),
        (192, 64, 14, "low_rank"),
        (96, 576, 14, "low_rank"),
        (160, 960, 7, "low_rank"),
        (960, 320, 7, "low_rank"),
        (320, 1280, 7, "low_rank"),
    ],
)
def test_large_maps_take_the_full_kernel_and_large_kernels_take_low_rank(
    c_in: int, c_out: int, size: int, expected: str
) -> None:
    assert _chosen(c_in, c_out, size) == expected


def test_grouped_kernels_always_take_the_full_kernel() -> None:
    assert _chosen(64, 64, 56, kernel=3) == "low_rank"
    assert _chosen(960, 960, 7, kernel=3, groups=960) == "full_kernel"


def test_large_rank_takes_the_full_kernel() -> None:
    assert _chosen(960, 320, 7, rank=4) == "low_rank"
    assert _chosen(960, 320, 7, rank=160) == "full_kernel"


def test_contiguous_maps_count_as_slower_to_read() -> None:
    x, y = _map(32, 28), _map(192, 28)
    size = torch.Size([192, 32, 1, 1])

    assert choose_gradient_route(x, y, size, 4) == "low_rank"
    assert choose_gradient_route(x.contiguous(), y.contiguous(), size, 4) == "full_kernel"


DENSE = [kind for kind, (_, _, geometry) in KINDS.items() if geometry.groups == 1]
# Every kind with the default route, and dense kinds with each route.
ROUTES = [(kind, None) for kind in KINDS] + [(kind, route) for kind in DENSE for route in ("full_kernel", "low_rank")]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "route"), ROUTES)
def test_output_and_gradients_equal_the_composed_form(kind: str, route: GradientRoute | None, dora: bool) -> None:
    # With a trained magnitude there is no low-rank route.
    case = make_case(kind, magnitude=dora and route != "low_rank")
    y, expected = case.run(dora=dora, route=route), case.composed(dora=dora)

    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients_of(y, case), gradients_of(expected, case), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("dora", "route"), [(False, "full_kernel"), (False, "low_rank"), (True, "full_kernel")])
@pytest.mark.parametrize("kind", ["dense", "strided", "pointwise", "conv3d"])
def test_gradients_equal_the_composed_form_in_channels_last(kind: str, dora: bool, route: GradientRoute) -> None:
    case = make_case(kind, magnitude=dora)
    memory_format = torch.channels_last_3d if kind == "conv3d" else torch.channels_last
    for name in ("x", "weight", "lora_a"):
        tensor = getattr(case, name)
        turned = tensor.detach().to(memory_format=memory_format).requires_grad_(tensor.requires_grad)
        case = case._replace(**{name: turned})

    found = gradients_of(case.run(dora=dora, route=route), case)

    for got, wanted in zip(found, gradients_of(case.composed(dora=dora), case), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("trained", ["lora_a", "lora_b", "magnitude", "bias", "x"])
@pytest.mark.parametrize("kind", ["dense", "strided", "depthwise"])
def test_each_gradient_alone_equals_the_composed_form(kind: str, trained: str) -> None:
    names = ("x", "lora_a", "lora_b", "magnitude", "bias")
    case = make_case(kind, **{name: name == trained for name in names})

    for route in (None, "full_kernel"):
        got = gradients_of(case.run(dora=True, route=route), case)
        torch.testing.assert_close(got, gradients_of(case.composed(dora=True), case))


@pytest.mark.parametrize(("kind", "route"), [("dense", "full_kernel"), ("strided", "low_rank"), ("depthwise", None)])
def test_first_and_second_derivatives_equal_finite_differences(kind: str, route: GradientRoute | None) -> None:
    case = make_case(kind, size=4)

    def forward(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
        return case._replace(x=x, lora_a=lora_a, lora_b=lora_b, bias=bias).run(route=route)

    inputs = (case.x, case.lora_a, case.lora_b, case.bias)
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_magnitude_gradient_equals_finite_differences(kind: str) -> None:
    case = make_case(kind, size=4)

    def forward(x: Tensor, magnitude: Tensor) -> Tensor:
        return case._replace(x=x, magnitude=magnitude).run(dora=True)

    assert torch.autograd.gradcheck(forward, (case.x, case.magnitude))


def test_second_derivative_without_the_input_raises() -> None:
    case = make_case("dense", lora_a=False)
    (grad,) = torch.autograd.grad(case.run(route="full_kernel").square().sum(), case.x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.sum(), case.lora_b)[0]).all()

    with pytest.raises(RuntimeError, match=r"no second derivative. Pass route='full_kernel'"):
        torch.autograd.grad(case.run().square().sum(), case.x, create_graph=True)


def test_low_rank_route_raises_for_groups_and_trained_magnitude() -> None:
    for case in (make_case("depthwise"), make_case("dense")):
        with pytest.raises(
            ValueError, match="route is 'low_rank', which requires one group and no trainable magnitude"
        ):
            case.run(route="low_rank", dora=True)


KEPT: list[tuple[str, bool, dict[str, bool], GradientRoute | None, bool]] = [
    # kind, DoRA, frozen tensors, route, whether the input is saved
    ("dense", False, {}, None, True),
    ("dense", False, {"lora_a": False}, None, False),
    ("dense", False, {"lora_a": False}, "full_kernel", True),
    ("dense", False, {"lora_b": False}, None, True),
    ("dense", True, {"lora_a": False}, None, True),
    ("dense", True, {"lora_a": False, "magnitude": False}, None, False),
    ("dense", True, {"lora_a": False, "lora_b": False, "magnitude": False}, None, False),
    ("depthwise", False, {"lora_a": False}, None, True),
    ("depthwise", False, {"lora_a": False, "lora_b": False}, None, False),
]


@pytest.mark.parametrize(("kind", "dora", "trained", "route", "expected"), KEPT)
def test_input_is_saved_only_if_a_gradient_needs_it(
    kind: str, dora: bool, trained: dict[str, bool], route: GradientRoute | None, expected: bool
) -> None:
    case = make_case(kind, size=20, **trained)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.run(dora=dora, route=route)

    assert (case.x.data_ptr() in kept) == expected
    trains_magnitude = dora and case.magnitude.requires_grad
    assert expected == lowrank_keeps_input(
        case.geometry.groups,
        trains_a=case.lora_a.requires_grad,
        trains_b=case.lora_b.requires_grad,
        trains_magnitude=trains_magnitude,
        route=route,
    )
    if not expected:
        # At most z = x * A with its three channels, and the layer's small tensors.
        z_bytes = 2 * 3 * 20 * 20 * 8 if case.lora_b.requires_grad else 0
        assert sum(kept.values()) <= z_bytes + 8 * sum(tensor.numel() for tensor in case[2:])


@pytest.mark.parametrize("route", ["full_kernel", "low_rank"])
def test_flops_match_the_formula_of_each_route(route: GradientRoute) -> None:
    class Model(nn.Module):
        def forward(self) -> Tensor:
            return case.run(route=route)

    case, model = make_case("strided", size=8), Model()
    with FlopCounter(model) as counter:
        y = model()
        y.square().sum().backward()

    columns, channels, rank, positions = 4 * 9, 6, 3, y.numel() // 6
    convolution = 2 * positions * columns * channels
    compose = 2 * channels * rank * columns
    # Both passes compose the kernel, and dX costs as much as the forward pass.
    routes = {
        "full_kernel": convolution + 2 * compose,
        "low_rank": 2 * positions * (2 * rank * columns + 2 * rank * channels),
    }
    flops = counter.result()
    assert flops.forward == convolution + compose
    assert flops.backward == convolution + compose + routes[route]


FORMATS = [
    (torch.Size([8, 3, 2, 5]), torch.contiguous_format),
    (torch.Size([8, 3, 2, 5]), torch.channels_last),
    (torch.Size([8, 3, 2, 5, 4]), torch.channels_last_3d),
]


def test_dense_kernel_equals_two_convolutions_in_sequence() -> None:
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
def test_lowrank_kernel_has_the_requested_memory_format(shape: torch.Size, memory_format: torch.memory_format) -> None:
    a, b = torch.randn(4, *shape[1:]), torch.randn(8, 4, *[1] * (len(shape) - 2))

    kernel = lowrank_kernel(a, b, 0.5, shape, memory_format)

    assert kernel.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(kernel, 0.5 * torch.einsum("or,r...->o...", b.flatten(1), a))


@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_as_matrix_and_as_kernel_are_inverse_views(shape: torch.Size, memory_format: torch.memory_format) -> None:
    kernel = torch.randn(shape).to(memory_format=memory_format)

    matrix = as_matrix(kernel, memory_format)

    assert matrix.shape == (8, kernel[0].numel())
    assert matrix.data_ptr() == kernel.data_ptr()
    assert torch.equal(as_kernel(matrix, shape, memory_format), kernel)


def test_dora_scale_sets_the_norm_of_each_channel_and_treats_it_as_constant() -> None:
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
