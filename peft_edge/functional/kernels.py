"""The kernels of low-rank adapters.

A kernel W of shape (C_out, C_in/g, *kernel) is read as a matrix (C_out, K) with K = C_in/g * prod(kernel). LoRA (Hu et
al. 2021, arXiv 2106.09685) adds s B A to it, with A of K columns and r rows and B of r columns and C_out rows. For one
group that is the chain of a full and a 1x1 convolution; for a depthwise convolution A holds r spatial kernels that all
channels share. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) then gives every output channel a trained length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lowrank_kernel(lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, shape: torch.Size) -> Tensor:
    """The kernel update s B A, reshaped to the kernel's shape.

    Args:
        lora_a: (r, ...) with K elements a row.
        lora_b: (C_out, r) with any number of trailing ones.
        scaling: s.
        shape: (C_out, C_in/g, *kernel) of the result.
    """
    # The scaling goes to the smaller factor: no second kernel is made.
    return ((lora_b.flatten(1) * scaling) @ lora_a.flatten(1)).view(shape)


def dora_scale(kernel: Tensor, magnitude: Tensor) -> Tensor:
    """The factor that gives each output channel of `kernel` its DoRA length, shaped to broadcast over the kernel.

    The norm is a constant to autograd (DoRA, section 4.3).

    Args:
        kernel: (C_out, C_in/g, *kernel).
        magnitude: C_out elements in any shape.
    """
    norm = kernel.detach().flatten(1).norm(dim=1).to(magnitude.dtype)
    # An all-zero channel has no direction: its scaled kernel stays zero instead of becoming NaN.
    scale = magnitude.flatten() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return scale.view(-1, *[1] * (kernel.dim() - 1))
