"""Tensor arithmetic: no PEFT, and modules only where their settings are read."""

from peft_edge.functional.convolution import Geometry, frozen_convolution
from peft_edge.functional.kernels import dora_scale, lowrank_kernel
from peft_edge.functional.lowrank import lowrank_conv2d
from peft_edge.functional.routes import calibrate_routes

__all__ = [
    "Geometry",
    "calibrate_routes",
    "dora_scale",
    "frozen_convolution",
    "lowrank_conv2d",
    "lowrank_kernel",
]
