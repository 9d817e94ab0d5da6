"""Run studies on one machine or on a cluster, and show the results as a table.

A study consists of training runs, of cost analyses, or of both. A grid file describes them.
"""

from peft_edge.study.cluster import Cluster
from peft_edge.study.grid import read_grid
from peft_edge.study.jobs import Job
from peft_edge.study.runner import run_grid, study_table

__all__ = ["Cluster", "Job", "read_grid", "run_grid", "study_table"]
