from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_edge.metrics import Accuracy


def test_accuracy_is_the_share_of_equal_entries() -> None:
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    metric = Accuracy()
    for part in np.split(np.arange(200), [64, 128]):
        metric.add_batch(predictions=predictions[part], references=torch.from_numpy(references[part]))
    assert metric.compute() == {"accuracy": pytest.approx(np.mean(predictions == references))}


def test_a_metric_starts_afresh_after_compute() -> None:
    metric = Accuracy()
    assert metric.compute(predictions=[1, 1], references=[1, 1]) == {"accuracy": 1.0}
    assert metric.compute(predictions=[1, 1], references=[0, 0]) == {"accuracy": 0.0}


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="Mismatch in the number"):
        Accuracy().add_batch(predictions=[1, 2], references=[1])


def test_metrics_filled_side_by_side_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "home"))
    first, second = Accuracy(), Accuracy()
    first.add_batch(predictions=[0], references=[0])
    second.add_batch(predictions=[0], references=[1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (tmp_path / "home").exists()
    assert first.compute() == {"accuracy": 1.0}
    assert second.compute() == {"accuracy": 0.0}
