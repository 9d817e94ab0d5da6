"""Run studies: grids of training runs and cost analyses on one machine or on a cluster, with a table of results."""

from peft_edge.study.cluster import Cluster
from peft_edge.study.grid import read_grid
from peft_edge.study.jobs import Job
from peft_edge.study.runner import run_grid, study_table

__all__ = ["Cluster", "Job", "read_grid", "run_grid", "study_table"]
