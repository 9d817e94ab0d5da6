"""Metrics as `evaluate` modules that need neither the network nor a cache directory, and figures made from them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from sklearn.metrics import accuracy_score


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` over integers for each image, kept in this process's memory.

    `evaluate.load` fetches a metric's code from the Hub, and the module it returns writes predictions into a locked
    file that all runs of a user share. A subclass defines `description` and `_compute`; `add_batch` and `compute` are
    evaluate's. Under several processes, gather first (`accelerator.gather_for_metrics`), then let each compute.
    """

    description: str
    inputs: tuple[str, ...] = ("predictions", "references")

    def __init__(self) -> None:
        # evaluate makes its directory even when nothing will be written there, and a home may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            features=Features({name: Value("int64") for name in self.inputs}),
        )


class Accuracy(InMemoryMetric):
    """The share of predictions that are right."""

    description = "The share of predictions that are right."

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class _ComparedWithBefore(InMemoryMetric):
    """A metric on the source's images that also takes `previous`, the predictions before an update."""

    inputs = ("predictions", "references", "previous")


class Retention(_ComparedWithBefore):
    """Accuracy after an update, as a share of the accuracy before it; None where nothing was right before."""

    description = "Accuracy after an update / accuracy before it, on the same images."

    def _compute(self, *, predictions: Any, references: Any, previous: Any) -> dict[str, float | None]:
        before, after = accuracy_score(references, previous), accuracy_score(references, predictions)
        return {"retention": float(after / before) if before else None}


class Forgetting(_ComparedWithBefore):
    """Accuracy before an update minus accuracy after it; negative where the update has helped."""

    description = "Accuracy before an update - accuracy after it, on the same images."

    def _compute(self, *, predictions: Any, references: Any, previous: Any) -> dict[str, float]:
        return {"forgetting": float(accuracy_score(references, previous) - accuracy_score(references, predictions))}


def average_forgetting(accuracies: Sequence[Sequence[float]]) -> float | None:
    """Returns how far the domains before the last one have fallen below their best, on average.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", equation 3: the mean over domains j < k of
    max over l < k of a[l][j], minus a[k][j], where k is the last step. Of two steps it is `Forgetting` on the first.

    Args:
        accuracies: `accuracies[l][j]` is the accuracy on domain j after step l; a row needs no domains after its own.

    Returns:
        Between -1 and 1; None where there is a single step, after which nothing can be forgotten.
    """
    *earlier, last = accuracies
    best = [max(row[domain] for row in earlier[domain:]) for domain in range(len(earlier))]
    return statistics.fmean(was - now for was, now in zip(best, last, strict=False)) if earlier else None


def harmonic_mean(new: float, old: float) -> float:
    """Returns the harmonic mean of the accuracies on new and on old classes: 0 unless both are learnt."""
    return statistics.harmonic_mean([new, old])
