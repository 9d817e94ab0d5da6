"""Compare the training steps of our methods and of other packages on one machine."""

from peft_edge.bench.contenders import CONTENDERS, Contender
from peft_edge.bench.measure import run_bench
from peft_edge.bench.results import BenchRecord, bench_table, save_bench_figure

__all__ = ["CONTENDERS", "BenchRecord", "Contender", "bench_table", "run_bench", "save_bench_figure"]
