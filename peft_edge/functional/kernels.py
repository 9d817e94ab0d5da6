"""The kernels of low-rank adapters.

A kernel W of shape (C_out, C_in/g, *kernel) is read as a matrix (C_out, K) with K = C_in/g * prod(kernel). LoRA (Hu et
al. 2021, arXiv 2106.09685) adds s B A to it, with A of K columns and r rows and B of r columns and C_out rows. For one
group that is the chain of a full and a 1x1 convolution; for a depthwise convolution A holds r spatial kernels that all
channels share. DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) then gives every output channel a trained length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_edge.functional.convolution import memory_format


def as_matrix(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A kernel's matrix (C_out, K), with the columns in the order of a memory format: a view of a kernel that has it.

    Args:
        kernel: (C_out, C_in/g, *kernel).
        memory_format: contiguous, or of the channels-last kind.
    """
    return (kernel if memory_format == torch.contiguous_format else kernel.movedim(1, -1)).flatten(1)


def as_kernel(matrix: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """The view of a matrix as the kernel of that memory format, whose `as_matrix` it is.

    Args:
        matrix: (C_out, K).
        shape: (C_out, C_in/g, *kernel).
        memory_format: contiguous, or of the channels-last kind.
    """
    if memory_format == torch.contiguous_format:
        return matrix.view(shape)
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def lowrank_kernel(
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    shape: torch.Size,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The kernel update s B A, in the kernel's shape.

    Args:
        lora_a: (r, C_in/g, *kernel).
        lora_b: (C_out, r) with any number of trailing ones.
        scaling: s.
        shape: (C_out, C_in/g, *kernel) of the result.
        memory_format: of the result; that of the kernel which it is added to saves rearranging either.
    """
    # The scaling goes to the smaller factor: no second kernel is made.
    return as_kernel((lora_b.flatten(1) * scaling) @ as_matrix(lora_a, memory_format), shape, memory_format)


def dora_scale(kernel: Tensor, magnitude: Tensor) -> Tensor:
    """The factor that gives each output channel of `kernel` its DoRA length, shaped to broadcast over the kernel.

    The norm is a constant to autograd (DoRA, section 4.3).

    Args:
        kernel: (C_out, C_in/g, *kernel).
        magnitude: C_out elements in any shape.
    """
    norm = as_matrix(kernel.detach(), memory_format(kernel)).norm(dim=1).to(magnitude.dtype)
    # An all-zero channel has no direction: its scaled kernel stays zero instead of becoming NaN.
    scale = magnitude.flatten() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return scale.view(-1, *[1] * (kernel.dim() - 1))
