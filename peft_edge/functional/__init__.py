"""Functions for convolutions, norms and activations that save few bytes for the backward pass."""

from peft_edge.functional.convolution import Geometry, lean_convolution
from peft_edge.functional.lowrank import dora_scale, lowrank_conv2d, lowrank_kernel

__all__ = ["Geometry", "dora_scale", "lean_convolution", "lowrank_conv2d", "lowrank_kernel"]
