"""The choice between the routes, and its calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_edge.functional import routes
from peft_edge.functional.routes import Speed, calibrate_routes, choose_route


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    routes._speeds.cache_clear()
    yield tmp_path / "peft-edge" / "routes.json"
    routes._speeds.cache_clear()


def _map(channels: int, size: int, batch: int = 16, device: str = "meta") -> Tensor:
    return torch.empty(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)


def _chosen(c_in: int, c_out: int, size: int, kernel: int = 1, groups: int = 1, rank: int = 4) -> str:
    weight_size = torch.Size([c_out, c_in // groups, kernel, kernel])
    # Meta tensors have no place: the CPU's constants hold.
    return choose_route(_map(c_in, size), _map(c_out, size), weight_size, rank)


@pytest.fixture(autouse=True)
def meta_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of real layers without their memory."""
    monkeypatch.setitem(routes._DEFAULTS, "meta", routes._DEFAULTS["cpu"])


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
        monkeypatch.setattr(routes, "_measured", lambda device, memory_format, speed=speed: speed)
        calibrate_routes()
        chosen.append(choose_route(x, y, size, 4))

    # Multiplications for nothing, then reading for nothing.
    assert chosen == ["project", "factor"]
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["channels_last"] == slow._asdict()
    assert [path.name for path in cache.parent.iterdir()] == ["routes.json"]
    monkeypatch.setattr(torch, "__version__", "another")
    routes._speeds.cache_clear()
    assert routes._speeds("cpu") == routes._DEFAULTS["cpu"]


def test_measured_speeds_are_positive_and_of_both_formats(cache: Path) -> None:
    speeds = calibrate_routes("cpu")

    assert set(speeds) == {"contiguous", "channels_last"}
    assert all(value > 0 for speed in speeds.values() for value in speed)
    assert routes._speeds("cpu") == speeds


def test_nothing_is_measured_or_written_unasked(cache: Path) -> None:
    _chosen(16, 96, 112)

    assert not cache.exists()
