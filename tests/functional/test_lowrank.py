"""The low-rank convolution and its backward against autograd's of the composed kernel, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_edge.functional.lowrank import keeps_input
from peft_edge.functional.routes import Route
from peft_edge.profiling import FlopCounter
from tests.functional.support import KINDS, gradients_of, make_case

DENSE = [kind for kind, (_, _, geometry) in KINDS.items() if geometry.groups == 1]
# Every kind by the route that is chosen, and those that can be forced to another one.
ROUTES = [(kind, None) for kind in KINDS] + [(kind, route) for kind in DENSE for route in ("project", "factor")]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "route"), ROUTES)
def test_output_and_gradients_are_those_of_the_composed_form(kind: str, route: Route | None, dora: bool) -> None:
    # The factors have two routes while DoRA's magnitude is frozen.
    case = make_case(kind, magnitude=dora and route != "factor")
    y, expected = case.run(dora=dora, route=route), case.composed(dora=dora)

    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients_of(y, case), gradients_of(expected, case), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("dora", "route"), [(False, "project"), (False, "factor"), (True, "project")])
@pytest.mark.parametrize("kind", ["dense", "strided", "pointwise", "conv3d"])
def test_gradients_in_channels_last(kind: str, dora: bool, route: Route) -> None:
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
def test_each_gradient_alone(kind: str, trained: str) -> None:
    names = ("x", "lora_a", "lora_b", "magnitude", "bias")
    case = make_case(kind, **{name: name == trained for name in names})

    for route in (None, "project"):
        got = gradients_of(case.run(dora=True, route=route), case)
        torch.testing.assert_close(got, gradients_of(case.composed(dora=True), case))


@pytest.mark.parametrize(("kind", "route"), [("dense", "project"), ("strided", "factor"), ("depthwise", None)])
def test_first_and_second_derivatives_equal_finite_differences(kind: str, route: Route | None) -> None:
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


def test_second_derivative_without_the_input_is_refused() -> None:
    case = make_case("dense", lora_a=False)
    (grad,) = torch.autograd.grad(case.run(route="project").square().sum(), case.x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.sum(), case.lora_b)[0]).all()

    with pytest.raises(RuntimeError, match=r"no second derivative. Pass route='project'"):
        torch.autograd.grad(case.run().square().sum(), case.x, create_graph=True)


def test_factor_route_is_refused_where_there_is_none() -> None:
    for case in (make_case("depthwise"), make_case("dense")):
        with pytest.raises(ValueError, match="route is 'factor', which is for one group and no trained magnitude"):
            case.run(route="factor", dora=True)


KEPT: list[tuple[str, bool, dict[str, bool], Route | None, bool]] = [
    # kind, DoRA, what is frozen, route, whether the input is kept
    ("dense", False, {}, None, True),
    ("dense", False, {"lora_a": False}, None, False),
    ("dense", False, {"lora_a": False}, "project", True),
    ("dense", False, {"lora_b": False}, None, True),
    ("dense", True, {"lora_a": False}, None, True),
    ("dense", True, {"lora_a": False, "magnitude": False}, None, False),
    ("dense", True, {"lora_a": False, "lora_b": False, "magnitude": False}, None, False),
    ("depthwise", False, {"lora_a": False}, None, True),
    ("depthwise", False, {"lora_a": False, "lora_b": False}, None, False),
]


@pytest.mark.parametrize(("kind", "dora", "trained", "route", "expected"), KEPT)
def test_input_is_kept_only_where_a_gradient_needs_it(
    kind: str, dora: bool, trained: dict[str, bool], route: Route | None, expected: bool
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
    assert expected == keeps_input(
        case.geometry.groups,
        trains_a=case.lora_a.requires_grad,
        trains_b=case.lora_b.requires_grad,
        trains_magnitude=trains_magnitude,
        route=route,
    )
    if not expected:
        # At most the three channels of A * x, of the map's size, beside the layer's own small tensors.
        z_bytes = 2 * 3 * 20 * 20 * 8 if case.lora_b.requires_grad else 0
        assert sum(kept.values()) <= z_bytes + 8 * sum(tensor.numel() for tensor in case[2:])


@pytest.mark.parametrize("route", ["project", "factor"])
def test_flops_are_those_of_the_route(route: Route) -> None:
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
    # The kernel is composed in either pass, and the gradient of the input costs what the forward does.
    routes = {
        "project": convolution + 2 * compose,
        "factor": 2 * positions * (2 * rank * columns + 2 * rank * channels),
    }
    flops = counter.result()
    assert flops.forward == convolution + compose
    assert flops.backward == convolution + compose + routes[route]
