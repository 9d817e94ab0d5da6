"""One training step of our methods and of their peers, measured side by side on one machine."""

from peft_edge.bench.measure import CONTENDERS, REFERENCE, Contender, run_bench
from peft_edge.bench.results import BenchRecord, BenchRow, bench_table, save_bench_figure

__all__ = [
    "CONTENDERS",
    "REFERENCE",
    "BenchRecord",
    "BenchRow",
    "Contender",
    "bench_table",
    "run_bench",
    "save_bench_figure",
]
