"""What a run has gained and lost, from the answers of its models."""

from __future__ import annotations

from typing import Any

from peft_edge.metrics import Retention, average_forgetting, harmonic_mean
from peft_edge.training.evaluation import Answers

TARGET, SOURCE = "test accuracy", "source test accuracy"
TARGET_BEFORE, SOURCE_BEFORE = f"{TARGET} without update", f"{SOURCE} without update"


def results(answers: list[list[Answers]]) -> dict[str, Any]:
    """Returns the figures of a run by their names in the record.

    Args:
        answers: For the source model, and then for the model after each target: the answers to the source's test
            split, and to that of every target.
    """
    (source_before, *targets_before), (source_after, *targets_after) = answers[0], answers[-1]
    # Without an update, the model afterwards is the one from before.
    rows = answers if len(answers) > 1 else answers * 2
    # After each step, the domains that it has seen.
    accuracies = [[answer.accuracy for answer in row[: step + 1]] for step, row in enumerate(rows)]
    figures = {
        TARGET: _pooled(targets_after).accuracy,
        SOURCE: source_after.accuracy,
        TARGET_BEFORE: _pooled(targets_before).accuracy,
        SOURCE_BEFORE: source_before.accuracy,
        **Retention().compute(**vars(source_after), previous=source_before.predictions),
        "forgetting": average_forgetting(accuracies),
        "harmonic mean": harmonic_mean(_pooled(targets_after).accuracy, source_after.accuracy),
    }
    return figures if len(accuracies) == 2 else {**figures, "accuracies": accuracies}


def _pooled(parts: list[Answers]) -> Answers:
    return Answers(
        [prediction for part in parts for prediction in part.predictions],
        [reference for part in parts for reference in part.references],
    )
