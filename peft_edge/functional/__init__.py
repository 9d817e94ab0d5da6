"""Tensor arithmetic: no PEFT, and modules only where their settings are read."""

from peft_edge.functional.convolution import Geometry, dora_scale, frozen_convolution, lowrank_kernel
from peft_edge.functional.lowrank import calibrate_routes, lowrank_conv2d

__all__ = [
    "Geometry",
    "calibrate_routes",
    "dora_scale",
    "frozen_convolution",
    "lowrank_conv2d",
    "lowrank_kernel",
]
