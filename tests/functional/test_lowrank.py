"""The choice between the routes, and its calibration.

The low-rank convolution and its backward against autograd's of the composed kernel, and finite differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_edge.functional import lowrank
from peft_edge.functional.lowrank import Route, Speed, calibrate_routes, choose_route, keeps_input
from peft_edge.profiling import FlopCounter
from tests.functional.support import KINDS, gradients_of, make_case


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lowrank._speeds.cache_clear()
    yield tmp_path / "peft-edge" / "routes.json"
    lowrank._speeds.cache_clear()


def _map(channels: int, size: int, batch: int = 16, device: str = "meta") -> Tensor:
    return torch.empty(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)


def _chosen(c_in: int, c_out: int, size: int, kernel: int = 1, groups: int = 1, rank: int = 4) -> str:
    weight_size = torch.Size([c_out, c_in // groups, kernel, kernel])
    # Meta tensors have no place: the CPU's constants hold.
    return choose_route(_map(c_in, size), _map(c_out, size), weight_size, rank)


@pytest.fixture(autouse=True)
def meta_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of real layers without their memory."""
    monkeypatch.setitem(lowrank._DEFAULTS, "meta", lowrank._DEFAULTS["cpu"])


@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "expected"),
    [
        # mobilenetv2_100 at 224 px, batch 16, as measured on one core.
        (32, 16, 112, "project"),
        (16, 96, 112, "project"),
        (96, 24, 56, "project"),
        (192, 64, 14, "factor"),
        (96, 576, 14, "factor"),
        (160, 960, 7, "factor"),
        (960, 320, 7, "factor"),
        (320, 1280, 7, "factor"),
    ],
)
def test_small_kernels_of_large_maps_project_and_large_kernels_factor(
    c_in: int, c_out: int, size: int, expected: str
) -> None:
    assert _chosen(c_in, c_out, size) == expected


def test_dense_kernels_factor_and_grouped_ones_project() -> None:
    assert _chosen(64, 64, 56, kernel=3) == "factor"
    assert _chosen(960, 960, 7, kernel=3, groups=960) == "project"


def test_a_rank_as_large_as_the_kernel_projects() -> None:
    assert _chosen(960, 320, 7, rank=4) == "factor"
    assert _chosen(960, 320, 7, rank=160) == "project"


def test_contiguous_maps_are_slower_to_read() -> None:
    x, y = _map(32, 28), _map(192, 28)
    size = torch.Size([192, 32, 1, 1])

    assert choose_route(x, y, size, 4) == "factor"
    assert choose_route(x.contiguous(), y.contiguous(), size, 4) == "project"


def test_calibration_is_kept_for_the_device_and_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = Speed(1e15, 1e6, 0.0), Speed(1.0, 1e15, 0.0)
    x, y, size = _map(64, 7, device="cpu"), _map(64, 7, device="cpu"), torch.Size([64, 64, 1, 1])
    chosen = []
    for speed in (quick, slow):
        monkeypatch.setattr(lowrank, "_measured", lambda device, memory_format, speed=speed: speed)
        calibrate_routes()
        chosen.append(choose_route(x, y, size, 4))

    # Multiplications for nothing, then reading for nothing.
    assert chosen == ["project", "factor"]
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["channels_last"] == slow._asdict()
    assert [path.name for path in cache.parent.iterdir()] == ["routes.json"]
    monkeypatch.setattr(torch, "__version__", "another")
    lowrank._speeds.cache_clear()
    assert lowrank._speeds("cpu") == lowrank._DEFAULTS["cpu"]


def test_measured_speeds_are_positive_and_of_both_formats(cache: Path) -> None:
    speeds = calibrate_routes("cpu")

    assert set(speeds) == {"contiguous", "channels_last"}
    assert all(value > 0 for speed in speeds.values() for value in speed)
    assert lowrank._speeds("cpu") == speeds


def test_nothing_is_measured_or_written_unasked(cache: Path) -> None:
    _chosen(16, 96, 112)

    assert not cache.exists()


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
