"""Run a configuration: train or load the source model, adapt it, test the saved adapter or model, write the record."""

from peft_edge.training.pipeline import run, train_source
from peft_edge.training.run_folder import is_started
from peft_edge.training.summary import new_record, summary_table

__all__ = ["is_started", "new_record", "run", "summary_table", "train_source"]
