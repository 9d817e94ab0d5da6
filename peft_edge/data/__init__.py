"""Load tasks. A task has a source domain, and target domains with shifted images or with new classes."""

from peft_edge.data.corruptions import FAMILIES, SHIFTS
from peft_edge.data.domain import Domain, Task
from peft_edge.data.loader import build_loader, build_transform, load_batches
from peft_edge.data.task import load_configured_task, load_task

__all__ = [
    "FAMILIES",
    "SHIFTS",
    "Domain",
    "Task",
    "build_loader",
    "build_transform",
    "load_batches",
    "load_configured_task",
    "load_task",
]
