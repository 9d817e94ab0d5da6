from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from peft_edge.report.stats import Difference, paired_difference, pareto, quartiles


def test_paired_differences_are_those_of_the_paired_t_test() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 7))
    found = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    test = scipy_stats.ttest_rel(first, second)
    assert found is not None
    assert found.error is not None
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.error == pytest.approx(scipy_stats.sem(first - second))
    assert found.pairs == 7


def test_only_what_belongs_together_is_compared() -> None:
    found = paired_difference({1: 0.5, 2: 0.75, 3: 9.0}, {2: 0.25, 1: 0.25, 4: 0.0})
    assert found == Difference(mean=0.375, error=0.125, pairs=2)
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


@pytest.mark.parametrize(
    ("mean", "error", "is_clear"),
    [(0.3, 0.1, True), (-0.3, 0.1, True), (0.19, 0.1, False), (0.0, 0.0, False), (0.1, 0.0, True), (1.0, None, False)],
)
def test_a_difference_is_clear_beyond_two_errors(mean: float, error: float | None, is_clear: bool) -> None:
    assert Difference(mean=mean, error=error, pairs=3).is_clear is is_clear


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_quartiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert quartiles(values.tolist()) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_of_nothing_there_are_no_quartiles() -> None:
    with pytest.raises(ValueError, match="no values"):
        quartiles([])


def dominated(points: np.ndarray, number: int) -> bool:
    no_worse = (points <= points[number]).all(axis=1)
    better = (points < points[number]).any(axis=1)
    return bool((no_worse & better).any())


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_the_front_is_what_nothing_dominates(dimensions: int) -> None:
    # Few values, so that there are ties and equal points.
    points = np.random.default_rng(dimensions).integers(0, 5, size=(60, dimensions))
    found = pareto(points.tolist())
    assert found == [not dominated(points, number) for number in range(len(points))]
    assert any(found)
    assert not all(found)
