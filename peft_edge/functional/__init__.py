"""Tensor arithmetic: no modules, no PEFT."""

from peft_edge.functional.batch_norm import synchronised_batch_norm
from peft_edge.functional.kernels import dora_scale, lowrank_kernel

__all__ = ["dora_scale", "lowrank_kernel", "synchronised_batch_norm"]
