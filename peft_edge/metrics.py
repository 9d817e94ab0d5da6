"""Metrics as `evaluate` modules that need neither the network nor a cache directory."""

from __future__ import annotations

import tempfile
from typing import Any

import evaluate
from datasets import Features, Value
from sklearn.metrics import accuracy_score


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` over integer predictions and references, kept in this process's memory.

    `evaluate.load` fetches a metric's code from the Hub, and the module it returns writes predictions into a locked
    file that all runs of a user share. A subclass defines `description` and `_compute`; `add_batch` and `compute` are
    evaluate's. Under several processes, gather first (`accelerator.gather_for_metrics`), then let each compute.
    """

    description: str

    def __init__(self) -> None:
        # evaluate makes its directory even when nothing will be written there, and a home may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )


class Accuracy(InMemoryMetric):
    """The share of predictions that are right."""

    description = "The share of predictions that are right."

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
