"""Measure what a training step costs: floating-point operations, memory and time. See README.md in this folder."""

from peft_edge.profiling.analysis import Analysis, analyse, compare_methods
from peft_edge.profiling.callback import ProfilingCallback
from peft_edge.profiling.flops import FlopCount, FlopCounter, Flops, count_flops
from peft_edge.profiling.memory import MemoryProfile, MemoryTracker, track_memory

__all__ = [
    "Analysis", "FlopCount", "FlopCounter", "Flops", "MemoryProfile", "MemoryTracker", "ProfilingCallback", "analyse",
    "compare_methods", "count_flops", "track_memory",
]  # fmt: skip
