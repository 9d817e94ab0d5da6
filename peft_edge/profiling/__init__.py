"""What a training step costs: floating-point operations, memory and time."""

from peft_edge.profiling.flops import FlopCount, FlopCounter, Flops, count_flops

__all__ = ["FlopCount", "FlopCounter", "Flops", "count_flops"]
