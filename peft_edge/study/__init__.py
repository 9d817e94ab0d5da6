"""Run studies: grids of training runs and cost analyses that several processes share, with a table of results."""

from peft_edge.study.grid import read_grid
from peft_edge.study.jobs import Job
from peft_edge.study.runner import run_grid, study_table

__all__ = ["Job", "read_grid", "run_grid", "study_table"]
