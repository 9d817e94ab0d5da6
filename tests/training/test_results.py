from __future__ import annotations

import pytest

from peft_edge.training.evaluation import Answers
from peft_edge.training.results import results


def answers(right: int, wrong: int) -> Answers:
    return Answers([1] * right + [0] * wrong, [1] * (right + wrong))


def test_one_target() -> None:
    before, after = [answers(8, 2), answers(1, 4)], [answers(6, 4), answers(4, 1)]
    assert results([before, after]) == {
        "test accuracy": 0.8,
        "source test accuracy": 0.6,
        "test accuracy without update": 0.2,
        "source test accuracy without update": 0.8,
        "retention": pytest.approx(0.75),
        "forgetting": pytest.approx(0.2),
        "harmonic mean": pytest.approx(2 * 0.8 * 0.6 / 1.4),
    }


def test_nothing_is_forgotten_without_an_update() -> None:
    found = results([[answers(8, 2), answers(1, 4)]])
    assert (found["retention"], found["forgetting"]) == (1, 0)


def test_increments_are_pooled_and_forgetting_counts_from_the_best() -> None:
    """The first target is learned to 1.0 and falls to 0.5; the source falls from 1.0 to 0.8 and to 0.7."""
    found = results(
        [
            [answers(10, 0), answers(0, 4), answers(0, 12)],
            [answers(8, 2), answers(4, 0), answers(0, 12)],
            [answers(7, 3), answers(2, 2), answers(9, 3)],
        ]
    )
    assert found["test accuracy"] == 11 / 16
    assert found["forgetting"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["accuracies"] == [[1.0], [0.8, 1.0], [0.7, 0.5, 0.75]]
