"""Tasks: labelled images from a source, and from targets that have shifted or bring new classes."""

from peft_edge.data.load import load_task
from peft_edge.data.loader import build_loader, load_batches
from peft_edge.data.shifts import FAMILIES, SHIFTS
from peft_edge.data.task import Domain, Task
from peft_edge.data.transforms import build_transform

__all__ = ["FAMILIES", "SHIFTS", "Domain", "Task", "build_loader", "build_transform", "load_batches", "load_task"]
