"""Which way to a low-rank kernel's gradients is the faster one.

Both are exact. *Project* makes the gradient of the whole kernel and multiplies it by A and by B: few passes over the
maps, many multiplications. *Factor* runs four convolutions of r channels: few multiplications, twice the reading. So
the arithmetic that a device does in the time of reading a byte decides.

The convolution with a low-rank update of its kernel, and a backward of its own.

The kernel is composed, W' = f (W + s B A) with DoRA's factor f for each output channel (one without a magnitude), and
one convolution runs. The gradient of the input needs W' alone, and those of A and B have two exact forms
(`peft_edge.functional.lowrank`), with G the gradient of W', z = A * x and u = (s f B)^T dY:

- *project*: dB = s f G A^T and dA = s (f B)^T G;
- *factor*: dB = s f dY z^T, and dA is the kernel gradient of a convolution from x to u.

So the input is kept only if A is trained, or a grouped kernel or a DoRA magnitude, which need all of G; where B alone
is trained (LoRA-FA) its r channels of z are kept. W' is made anew in the backward.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional.convolution import (
    Geometry,
    as_kernel,
    as_matrix,
    convolution,
    dora_scale,
    input_gradient,
    kernel_gradient,
    lowrank_kernel,
    memory_format,
    needs_backward,
)
from peft_edge.functional.recompute import Recompute, get_recompute, identity_recompute, set_recompute

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


def lowrank_conv2d(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    geometry: Geometry,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    route: Route | None = None,
    recompute: bool = False,
) -> Tensor:
    """The convolution by f (W + s B A), of one to three dimensions.

    There are gradients for the input, A, B, the magnitude and the bias. The plain form's operators are all that runs,
    so that FLOP counters, fake tensors, compilers and exporters see them.

    Args:
        x: (B, C_in, *size).
        weight: W, (C_out, C_in/g, *kernel), a constant.
        lora_a: A, (r, C_in/g, *kernel).
        lora_b: B, (C_out, r, 1, ...).
        scaling: s.
        geometry: how the kernel moves.
        bias: (C_out,) or None.
        magnitude: C_out elements in any shape, DoRA's trained lengths of W + s B A, or None.
        route: to the gradients of A and B; by default what is faster, and with A frozen what keeps less.
        recompute: let others make the result from x, which must be kept, instead of keeping it.

    Raises:
        ValueError: if the route is "factor" for a grouped kernel or a trained magnitude.
    """
    if not needs_backward():
        return _forward(x, weight, lora_a, lora_b, magnitude, bias, scaling, geometry)
    if route == "factor" and (geometry.groups > 1 or (magnitude is not None and magnitude.requires_grad)):
        raise ValueError(
            f"lowrank_conv2d: route is 'factor', which is for one group and no trained magnitude; found "
            f"{geometry.groups} groups and {'no' if magnitude is None else 'a'} magnitude. Use 'project' or None."
        )
    y = _LowRankConvolution.apply(x, weight, lora_a, lora_b, magnitude, bias, scaling, geometry, route)
    if not recompute:
        return y
    tensors = [tensor for tensor in (weight, lora_a, lora_b, magnitude, bias) if tensor is not None]
    versions = [tensor._version for tensor in tensors]

    def again(x: Tensor) -> Tensor:
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError(
                "lowrank_conv2d: parameters were changed in place before the backward pass, which needs them"
            )
        return _forward(x, weight, lora_a, lora_b, magnitude, bias, scaling, geometry)

    return set_recompute(y, _kept_form(x).then(again, num_convolutions=1))


def keeps_input(
    groups: int, *, trains_a: bool, trains_b: bool, trains_magnitude: bool = False, route: Route | None = None
) -> bool:
    """Whether the backward of `lowrank_conv2d` keeps the convolution's input.

    Args:
        groups: the convolution's.
        trains_a: whether A is trained.
        trains_b: whether B is trained.
        trains_magnitude: whether there is a DoRA magnitude that is trained.
        route: as given to `lowrank_conv2d`.
    """
    return trains_a or trains_magnitude or (trains_b and (groups > 1 or route == "project"))


def _kept_form(x: Tensor) -> Recompute:
    """What is kept of an input: its recipe if that is one convolution at most; else it would lead ever further back."""
    recipe = get_recompute(x)
    return recipe if recipe.num_convolutions <= 1 else identity_recompute(x)


def _composed(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    """W + s B A."""
    update = lowrank_kernel(lora_a, lora_b, scaling, weight.shape, memory_format(weight))
    # In place where the types allow it: beside W, a large kernel is made once and not twice.
    return update.add_(weight) if update.dtype == weight.dtype else update + weight


def _used_up(kernel: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product with a kernel that nobody needs afterwards: in place where no derivative is taken of it."""
    if factor is None or factor.dtype != kernel.dtype or torch.is_grad_enabled():
        return _product(kernel, factor, dtype)
    return kernel.mul_(factor).to(dtype)


def _product(tensor: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (tensor if factor is None else tensor * factor).to(dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float | Tensor,
    geometry: Geometry,
) -> Tensor:
    kernel = _composed(weight, lora_a, lora_b, scaling)
    factor = None if magnitude is None else dora_scale(kernel, magnitude)
    return convolution(x, _used_up(kernel, factor, weight.dtype), bias, geometry)


class _LowRankConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        bias: Tensor | None,
        scaling: float | Tensor,
        geometry: Geometry,
        route: Route | None,
    ) -> Tensor:
        _, _, trains_a, trains_b, trains_magnitude, *_ = ctx.needs_input_grad
        keeps_x = keeps_input(
            geometry.groups, trains_a=trains_a, trains_b=trains_b, trains_magnitude=trains_magnitude, route=route
        )
        z = _down_projection(x, lora_a.to(x.dtype), geometry) if trains_b and not keeps_x else None
        ctx.make_x, ingredients, _ = _kept_form(x) if keeps_x else (None, (), 0)
        ctx.save_for_backward(z, weight, lora_a, lora_b, magnitude, *ingredients)
        y = _forward(x, weight, lora_a, lora_b, magnitude, bias, scaling, geometry)
        ctx.x_size, ctx.memory_format = x.shape, memory_format(y)
        ctx.scaling, ctx.geometry, ctx.route = scaling, geometry, route
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A pooled map's gradient is contiguous, and all that comes of it would be.
        grad_output = gradients[0].contiguous(memory_format=ctx.memory_format)
        z, weight, lora_a, lora_b, magnitude, *ingredients = ctx.saved_tensors
        x = ctx.make_x(*ingredients) if ctx.make_x is not None else None
        wants_x, _, wants_a, wants_b, wants_magnitude, wants_bias, *_ = ctx.needs_input_grad
        scaling, geometry = ctx.scaling, ctx.geometry
        # Under autocast the gradient has a type of its own.
        dtype = grad_output.dtype
        kernel = factor = None
        if magnitude is not None:
            kernel = _composed(weight, lora_a, lora_b, scaling)
            factor = dora_scale(kernel, magnitude)
        grad_x = grad_a = grad_b = grad_magnitude = grad_bias = None
        if x is None:
            if z is not None:
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        "lowrank_conv2d: with lora_a frozen the input is not kept, so there is no second derivative. "
                        "Pass route='project', which keeps it."
                    )
                grad_b = _grad_b(grad_output, z.to(dtype), lora_b, scaling, factor)
        elif wants_magnitude or (ctx.route or choose_route(x, grad_output, weight.shape, len(lora_a))) == "project":
            # Without a name, so that the gradient of the kernel, which may be large, is gone at the next one.
            grad_a, grad_b, grad_magnitude = _projected(
                kernel_gradient(grad_output, x.to(dtype), weight.shape, geometry).to(lora_a.dtype),
                lora_a if wants_b else None,
                lora_b if wants_a else None,
                scaling,
                factor,
                (kernel, magnitude) if wants_magnitude else None,
            )
        else:
            x = x.to(dtype)
            if wants_b:
                z = _down_projection(x, lora_a.to(dtype), geometry)
                grad_b = _grad_b(grad_output, z, lora_b, scaling, factor)
            if wants_a:
                u_size = torch.Size([len(x), len(lora_a), *grad_output.shape[2:]])
                u = input_gradient(
                    grad_output, _product(lora_b * scaling, factor, dtype), u_size, _pointwise(grad_output)
                )
                grad_a = kernel_gradient(u, x, lora_a.shape, geometry)
        if wants_bias:
            grad_bias = grad_output.sum([0, *range(2, grad_output.dim())])
        if wants_x:
            # Last, when the other gradients' temporaries are gone.
            kernel = _composed(weight, lora_a, lora_b, scaling) if kernel is None else kernel
            grad_x = input_gradient(grad_output, _used_up(kernel, factor, dtype), ctx.x_size, geometry)
        return grad_x, None, grad_a, grad_b, grad_magnitude, grad_bias, None, None, None


def _down_projection(x: Tensor, lora_a: Tensor, geometry: Geometry) -> Tensor:
    """A * x, of r channels."""
    if geometry == _pointwise(x) and lora_a[0, 0].numel() == 1 and memory_format(x) != torch.contiguous_format:
        # To so few channels a product of matrices takes about half as long as a convolution (CPU).
        return F.linear(x.movedim(1, -1), lora_a.flatten(1)).movedim(-1, 1)
    return convolution(x, lora_a, None, geometry)


def _projected(
    grad_kernel: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float | Tensor,
    factor: Tensor | None,
    dora: tuple[Any, Any] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of A (if B is given), B (if A is given) and the magnitude, from that of the composed kernel.

    A kernel may be large, so factors of its rows go to the small matrices that it is multiplied by.
    """
    layout = memory_format(grad_kernel)
    rows, row_scaling = as_matrix(grad_kernel, layout), scaling if factor is None else factor.flatten(1) * scaling
    grad_a = grad_b = grad_magnitude = None
    if lora_b is not None:
        shape = torch.Size([lora_b.shape[1], *grad_kernel.shape[1:]])
        grad_a = as_kernel((lora_b.flatten(1) * row_scaling).mT.to(rows.dtype) @ rows, shape, layout)
    if lora_a is not None:
        grad_b = (rows @ as_matrix(lora_a, layout).mT * row_scaling).view(len(rows), -1, *[1] * (grad_kernel.dim() - 2))
    if dora is not None:
        kernel, magnitude = dora
        unit = dora_scale(kernel, torch.ones_like(magnitude)).flatten()
        products = torch.linalg.vecdot(rows, as_matrix(kernel, layout)) * unit
        grad_magnitude = products.to(magnitude.dtype).view_as(magnitude)
    return grad_a, grad_b, grad_magnitude


def _grad_b(grad_output: Tensor, z: Tensor, lora_b: Tensor, scaling: float | Tensor, factor: Tensor | None) -> Tensor:
    grad = kernel_gradient(grad_output, z, lora_b.shape, _pointwise(z))
    return _product(grad * scaling, factor, lora_b.dtype)


def _pointwise(x: Tensor) -> Geometry:
    dims = x.dim() - 2
    return Geometry((1,) * dims, (0,) * dims, (1,) * dims)
