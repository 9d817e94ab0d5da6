"""Which way to a low-rank kernel's gradients is the faster one.

Both are exact. *Project* makes the gradient of the whole kernel and multiplies it by A and by B: few passes over the
maps, many multiplications. *Factor* runs four convolutions of r channels: few multiplications, twice the reading. So
the arithmetic that a device does in the time of reading a byte decides.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peft_edge.functional.convolution import Geometry, input_gradient, kernel_gradient

Route = Literal["project", "factor"]


class Speed(NamedTuple):
    """What a device does in the backward of convolutions."""

    flops_per_s: float
    """Multiply-adds count two."""
    bytes_per_s: float
    """Of maps that are read."""
    call_s: float
    """The time of a convolution that has nothing to do."""


# CPU: measured on one core of an AMD EPYC (AVX2) with torch 2.15. CUDA: a guess, for a large GPU.
_DEFAULTS = {
    "cpu": {"channels_last": Speed(60e9, 8e9, 20e-6), "contiguous": Speed(60e9, 5e9, 20e-6)},
    "cuda": {"channels_last": Speed(20e12, 1e12, 30e-6), "contiguous": Speed(20e12, 1e12, 30e-6)},
}


def choose_route(x: Tensor, grad_output: Tensor, weight_size: torch.Size, rank: int) -> Route:
    """The route that takes less time for a convolution whose low-rank factors are both trained.

    Only shapes, type, memory format and device of the tensors count.

    Args:
        x: (B, C_in, *size), the convolution's input.
        grad_output: (B, C_out, *output size).
        weight_size: (C_out, C_in/g, *kernel).
        rank: r.
    """
    c_out, columns = weight_size[0], weight_size[1:].numel()
    if weight_size[1] != x.shape[1]:
        # The factors of a grouped kernel are no convolutions of the input.
        return "project"
    positions = grad_output.numel() // c_out
    read_bytes = (x.numel() + grad_output.numel()) * x.element_size()
    speed = _speed(x.device.type, "contiguous" if x.is_contiguous() else "channels_last")
    saved_flops = 2 * positions * (columns * c_out - 2 * rank * (columns + c_out))
    added_s = read_bytes / speed.bytes_per_s + 3 * speed.call_s
    return "factor" if saved_flops / speed.flops_per_s > added_s else "project"


def calibrate_routes(device: torch.device | str = "cpu") -> dict[str, Speed]:
    """Measures the device that `choose_route` shall choose for, in about a second, from now on and in later processes.

    The speeds are kept in the user's cache folder (`$XDG_CACHE_HOME/peft-edge` or `~/.cache/peft-edge`), for this
    device, number of threads and version of torch. Nothing is measured unless this is called: another route rounds
    differently, and a run shall resume to the same weights.

    Args:
        device: whose speeds are measured.

    Returns:
        The speeds by memory format, `contiguous` and `channels_last`.
    """
    device = torch.device(device)
    speeds = {
        "contiguous": _measured(device, torch.contiguous_format),
        "channels_last": _measured(device, torch.channels_last),
    }
    file = _calibration_file()
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[_device_key(device.type)] = {name: speed._asdict() for name, speed in speeds.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    _speeds.cache_clear()
    return speeds


@torch.compiler.assume_constant_result
def _speed(device_type: str, memory_format: str) -> Speed:
    return _speeds(device_type)[memory_format]


@functools.cache
def _speeds(device_type: str) -> dict[str, Speed]:
    file = _calibration_file()
    if file.is_file():
        calibrated = json.loads(file.read_text(encoding="utf-8")).get(_device_key(device_type))
        if calibrated is not None:
            return {name: Speed(**speed) for name, speed in calibrated.items()}
    return _DEFAULTS.get(device_type, _DEFAULTS["cuda"])


def _calibration_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "peft-edge" / "routes.json"


def _device_key(device_type: str) -> str:
    if device_type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{device_type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def _measured(device: torch.device, memory_format: torch.memory_format) -> Speed:
    pointwise = Geometry((1, 1), (0, 0), (1, 1))

    def tensor(channels: int, size: int) -> Tensor:
        return torch.randn(16, channels, size, size, device=device).to(memory_format=memory_format)

    wide_x, wide_y = tensor(576, 14), tensor(96, 14)
    # A map that is larger than most caches, as those of a mobile network's first blocks are.
    large, weight = tensor(96, 56), torch.randn(96, 4, 1, 1, device=device)
    tiny = tensor(8, 1)
    product_s = _seconds(lambda: kernel_gradient(wide_y, wide_x, torch.Size([96, 576, 1, 1]), pointwise), device)
    reading_s = _seconds(lambda: input_gradient(large, weight, torch.Size([16, 4, 56, 56]), pointwise), device)
    call_s = _seconds(lambda: kernel_gradient(tiny, tiny, torch.Size([8, 8, 1, 1]), pointwise), device)
    return Speed(2 * wide_x.numel() * 96 / product_s, large.nbytes / reading_s, call_s)


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """The best time of several."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    best = float("inf")
    for _ in range(8):
        wait()
        start = time.perf_counter()
        operation()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
