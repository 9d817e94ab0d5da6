"""Runs: make or find the source model, adapt it, evaluate it, and write down what came of it."""

from peft_edge.training.run import run
from peft_edge.training.run_folder import read_record
from peft_edge.training.summary import failed_record, table

__all__ = ["failed_record", "read_record", "run", "table"]
