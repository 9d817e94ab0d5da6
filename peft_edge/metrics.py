"""Compute accuracy, retention, forgetting and harmonic mean, without a network connection or a cache on disk."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence

import evaluate
import numpy as np
from datasets import Features, Value


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that keeps its inputs in memory. Each input has one integer per image.

    A metric from `evaluate.load` would fetch its code from the Hub, and write predictions to a locked file that all
    runs of a user share. A subclass must define `_compute`. With several processes, call
    `accelerator.gather_for_metrics` on the inputs first, and then compute the metric in each process.
    """

    inputs: tuple[str, ...] = ("predictions", "references")

    def __init__(self) -> None:
        # evaluate creates its cache folder even if it writes nothing there, and the home folder may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())

    def _info(self) -> evaluate.MetricInfo:
        features = Features({name: Value("int64") for name in self.inputs})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)


class Accuracy(InMemoryMetric):
    """The fraction of correct predictions."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": _accuracy(predictions, references)}


class Retention(InMemoryMetric):
    """Accuracy after adaptation (`predictions`) divided by accuracy before (`previous`); None if the divisor is 0."""

    inputs = ("predictions", "references", "previous")

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], previous: Sequence[int]
    ) -> dict[str, float | None]:
        before, after = _accuracy(previous, references), _accuracy(predictions, references)
        return {"retention": after / before if before else None}


class Forgetting(InMemoryMetric):
    """Accuracy before adaptation (`previous`) minus accuracy after it (`predictions`); negative if accuracy rose."""

    inputs = ("predictions", "references", "previous")

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], previous: Sequence[int]
    ) -> dict[str, float]:
        return {"forgetting": _accuracy(previous, references) - _accuracy(predictions, references)}


def _accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def average_forgetting(accuracies: Sequence[Sequence[float]]) -> float | None:
    """Return how far the accuracies on earlier domains have dropped from their best values, averaged over the domains.

    A model learns one domain in each step: domain 0 in step 0, domain 1 in step 1, and so on. `accuracies[l][j]` is the
    accuracy on domain j after step l, and k is the last step. Return None if there is only one step. Otherwise, the
    result is the mean over j < k of max(accuracies[l][j] for j <= l < k) - accuracies[k][j]. This is
    equation 3 of Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", except that their maximum also
    includes l < j. Row l of `accuracies` needs only the domains 0 to l. With two steps, the result equals `Forgetting`
    on the first domain.
    """
    *earlier, last = accuracies
    best = [max(row[domain] for row in earlier[domain:]) for domain in range(len(earlier))]
    return statistics.fmean(was - now for was, now in zip(best, last, strict=False)) if earlier else None


def harmonic_mean(new: float, old: float) -> float:
    """Return the harmonic mean of the accuracies on new and on old classes; 0 if one of these accuracies is 0."""
    return statistics.harmonic_mean([new, old])
