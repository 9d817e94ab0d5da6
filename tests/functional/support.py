"""Random tensors of convolution layers, for the tests of the low-rank convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_edge.functional.convolution import Geometry
from peft_edge.functional.lowrank import GradientRoute, lowrank_conv2d


class Case(NamedTuple):
    """The tensors of an adapted layer with four input channels. All tensors but `weight` may be trained."""

    geometry: Geometry
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    bias: Tensor

    def run(self, *, dora: bool = False, route: GradientRoute | None = None) -> Tensor:
        geometry, x, weight, lora_a, lora_b, magnitude, bias = self
        return lowrank_conv2d(
            x, weight, lora_a, lora_b, 0.7, geometry=geometry, bias=bias, route=route,
            magnitude=magnitude if dora else None,
        )  # fmt: skip

    def composed(self, *, dora: bool = False) -> Tensor:
        """Return the same output as `run`, computed by torch functions, so that autograd derives the backward pass."""
        rows = self.weight.flatten(1) + 0.7 * self.lora_b.flatten(1) @ self.lora_a.flatten(1)
        if dora:
            rows = rows * (self.magnitude.flatten() / rows.detach().norm(dim=1)).unsqueeze(1)
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.x.dim() - 3]
        return conv(self.x, rows.view_as(self.weight), self.bias, *self.geometry)


KINDS: dict[str, tuple[int, tuple[int, ...], Geometry]] = {
    # number of output channels, kernel size, geometry
    "dense": (6, (3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    "strided": (6, (3, 3), Geometry((2, 2), (0, 1), (1, 1))),
    "dilated": (6, (3, 3), Geometry((1, 1), (1, 1), (2, 2))),
    "pointwise": (6, (1, 1), Geometry((1, 1), (0, 0), (1, 1))),
    "conv1d": (6, (3,), Geometry((2,), (1,), (1,))),
    "conv3d": (2, (1, 3, 2), Geometry((1, 1, 1), (0, 1, 0), (1, 1, 1))),
    "grouped": (8, (3, 3), Geometry((2, 1), (1, 1), (1, 1), 2)),
    "depthwise": (4, (3, 3), Geometry((2, 2), (1, 1), (1, 1), 4)),
    "depthwise with multiplier": (8, (3, 1), Geometry((1, 1), (0, 0), (2, 1), 4)),
}


def make_case(kind: str, dtype: torch.dtype = torch.float64, size: int = 6, **trained: bool) -> Case:
    """Return random tensors for a layer of a kind in `KINDS`, with an adapter of rank 3.

    All tensors but the weight require a gradient. To freeze the tensor `name`, pass `name=False`.
    """
    channels, kernel, geometry = KINDS[kind]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    columns = (4 // geometry.groups, *kernel)
    case = Case(
        geometry,
        x=tensor(2, 4, *[size] * len(kernel)),
        weight=tensor(channels, *columns),
        lora_a=tensor(3, *columns),
        lora_b=tensor(channels, 3, *[1] * len(kernel)),
        magnitude=tensor(1, channels, *[1] * len(kernel)).abs() + 0.5,
        bias=tensor(channels),
    )
    for name in ("x", "lora_a", "lora_b", "magnitude", "bias"):
        getattr(case, name).requires_grad_(trained.get(name, True))
    return case


def gradients_of(y: Tensor, case: Case) -> list[Tensor | None]:
    """Return the gradients of the sum of y² for all tensors of `case` that require one, in the order of `case`."""
    wanted = [value for value in case[1:] if value.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), wanted, allow_unused=True))
