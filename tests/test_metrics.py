"""Metrics against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_edge.metrics import Accuracy, Forgetting, Retention, average_forgetting, harmonic_mean


def test_accuracy_is_the_share_of_correct_predictions() -> None:
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    metric = Accuracy()
    for part in np.split(np.arange(200), [64, 128]):
        metric.add_batch(predictions=predictions[part], references=torch.from_numpy(references[part]))
    assert metric.compute() == {"accuracy": pytest.approx(np.mean(predictions == references))}


def test_compute_resets_the_metric() -> None:
    metric = Accuracy()
    assert metric.compute(predictions=[1, 1], references=[1, 1]) == {"accuracy": 1.0}
    assert metric.compute(predictions=[1, 1], references=[0, 0]) == {"accuracy": 0.0}


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="Mismatch in the number"):
        Accuracy().add_batch(predictions=[1, 2], references=[1])


def test_two_metrics_at_once_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "home"))
    first, second = Accuracy(), Accuracy()
    first.add_batch(predictions=[0], references=[0])
    second.add_batch(predictions=[0], references=[1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (tmp_path / "home").exists()
    assert first.compute() == {"accuracy": 1.0}
    assert second.compute() == {"accuracy": 0.0}


def test_retention_and_forgetting_compare_with_previous_predictions() -> None:
    columns = {"references": [0, 1, 1, 0], "previous": [0, 1, 1, 1], "predictions": [0, 0, 0, 0]}
    assert Retention().compute(**columns) == {"retention": pytest.approx(2 / 3)}
    assert Forgetting().compute(**columns) == {"forgetting": pytest.approx(0.25)}


def test_add_batch_takes_previous_predictions() -> None:
    metric = Forgetting()
    for index in range(4):
        metric.add_batch(predictions=[0], references=[index % 2], previous=[index % 2])
    assert metric.compute() == {"forgetting": 0.5}


def test_forgetting_is_negative_if_the_update_helped() -> None:
    columns = {"references": [0, 1], "previous": [1, 1], "predictions": [0, 1]}
    assert Retention().compute(**columns) == {"retention": 2.0}
    assert Forgetting().compute(**columns) == {"forgetting": -0.5}


def test_retention_is_none_if_nothing_was_correct_before() -> None:
    assert Retention().compute(references=[0, 1], previous=[1, 0], predictions=[0, 1]) == {"retention": None}


def test_retention_requires_previous_predictions() -> None:
    with pytest.raises(ValueError, match="previous"):
        Retention().compute(predictions=[0], references=[0])


def test_average_forgetting_equals_the_published_formula() -> None:
    # Worked by hand: domain 0 was best (0.9) after step 1, domain 1 (0.7) after step 2.
    accuracies = [[0.8], [0.9, 0.6], [0.7, 0.7, 0.5], [0.6, 0.4, 0.45, 0.9]]
    assert average_forgetting(accuracies) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.4) + (0.5 - 0.45)) / 3)


def test_average_forgetting_ignores_accuracies_before_a_domain_was_learnt() -> None:
    # All domains are evaluated after every step.
    assert average_forgetting([[0.8, 0.99], [0.6, 0.5]]) == pytest.approx(0.2)
    assert average_forgetting([[0.8]]) is None


def test_harmonic_mean_is_zero_if_one_accuracy_is_zero() -> None:
    assert harmonic_mean(0.73, 0.87) == pytest.approx(2 * 0.73 * 0.87 / (0.73 + 0.87))
    assert harmonic_mean(0.0, 0.98) == 0.0
