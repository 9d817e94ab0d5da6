"""What records of runs say about the accuracy of ways to train."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_edge.methods import METHODS
from peft_edge.records import Record

# The name in PEFT's method_comparison, and so in the records.
_ACCURACY = "test accuracy"

Way = tuple[str, str | None, int | None, str | None]
"""What decides on the accuracy: method, target modules, LoRA rank and norm."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one way to train."""

    accuracy: float
    """The mean test accuracy of its runs."""

    runs: int
    """How many there are."""

    advantage: float
    """How much more that is than the mean of all runs on the same task, on average over its tasks: what can be
    compared where ways were tried on different tasks."""


def on_backbone(records: Sequence[Record], backbone: str) -> list[Record]:
    """The records of runs on this network."""
    return [record for record in records if record.run_info.train_config["backbone"]["name"] == backbone]


def evidence(records: Sequence[Record]) -> dict[Way, Evidence]:
    """Returns what the records say of every way that was tried."""
    tasks: dict[str, list[float]] = defaultdict(list)
    ways: dict[Way, list[tuple[str, float]]] = defaultdict(list)
    for record in records:
        config = record.run_info.train_config
        task = json.dumps([config["backbone"], config["data"]], sort_keys=True)
        accuracy = record.train_info.metrics[-1][_ACCURACY]
        tasks[task].append(accuracy)
        ways[_way(config)].append((task, accuracy))
    means = {task: statistics.fmean(accuracies) for task, accuracies in tasks.items()}
    return {
        way: Evidence(
            accuracy=statistics.fmean(accuracy for _, accuracy in runs),
            runs=len(runs),
            advantage=_advantage(runs, means),
        )
        for way, runs in ways.items()
    }


def _advantage(runs: Sequence[tuple[str, float]], means: dict[str, float]) -> float:
    own: dict[str, list[float]] = defaultdict(list)
    for task, accuracy in runs:
        own[task].append(accuracy)
    return statistics.fmean(statistics.fmean(accuracies) - means[task] for task, accuracies in own.items())


def _way(config: dict[str, Any]) -> Way:
    method = config["method"]
    if method in METHODS and METHODS[method].section == "adapter":
        targets = config["adapter"]["target_modules"]
        return method, targets, config["adapter"]["r"], config["norm"]
    return method, None, None, config["norm"]
