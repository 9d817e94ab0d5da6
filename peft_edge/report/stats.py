"""The statistics of a study: paired differences over seeds, quartiles, and the Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ERRORS = 2
"""How many standard errors a paired difference must be from zero for two methods to be told apart."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference."""

    mean: float
    """Over the pairs."""

    error: float | None
    """Its standard error: the deviation of the differences over the root of their number; None for a single pair."""

    pairs: int
    """How many pairs."""

    @property
    def is_clear(self) -> bool:
        """Whether it is more than `ERRORS` standard errors from zero; never with a single pair."""
        return self.error is not None and abs(self.mean) > ERRORS * self.error


def paired_difference(values: Mapping[object, float], others: Mapping[object, float]) -> Difference | None:
    """Compares values that belong together, such as two methods' on the same seed, which start from the same source.

    Args:
        values: By what they share with `others`.
        others: What is subtracted.

    Returns:
        Over what both have; None if that is nothing.
    """
    differences = [value - others[key] for key, value in values.items() if key in others]
    if not differences:
        return None
    pairs = len(differences)
    error = statistics.stdev(differences) / pairs**0.5 if pairs > 1 else None
    return Difference(mean=statistics.fmean(differences), error=error, pairs=pairs)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile, interpolated between the values.

    Raises:
        ValueError: There are no values.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    if not values:
        raise ValueError("there are no values to take quartiles of")
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """Returns for each point whether no other is at most as large in everything and smaller in something.

    Args:
        points: Of equally many numbers, all of which are to be small.
    """
    return [
        not any(
            all(theirs <= ours for theirs, ours in zip(other, point, strict=True)) and tuple(other) != tuple(point)
            for other in points
        )
        for point in points
    ]
