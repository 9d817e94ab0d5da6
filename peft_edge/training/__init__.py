"""The stages of a run: make or find the source model, adapt it, evaluate it, and write down what came of it."""

from peft_edge.training.adaptation import Candidate, adapt, check_adaptation
from peft_edge.training.evaluation import check_saved, first_images, load_update, test_accuracies
from peft_edge.training.launch import start, start_trackers
from peft_edge.training.run_folder import RunFolder, open_run
from peft_edge.training.source import source_model
from peft_edge.training.summary import build_record, failure_recorded, table

__all__ = [
    "Candidate",
    "RunFolder",
    "adapt",
    "build_record",
    "check_adaptation",
    "check_saved",
    "failure_recorded",
    "first_images",
    "load_update",
    "open_run",
    "source_model",
    "start",
    "start_trackers",
    "table",
    "test_accuracies",
]
