from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peft_edge.records import MetaInfo, Record, RunInfo, TrainInfo


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes the record of a run that has succeeded."""
    return _record


def _record(method: str, accuracy: float, *, backbone: str = "net", task: str = "a", **train: Any) -> Record:
    config = {
        "method": method,
        "norm": "stats",
        "backbone": {"name": backbone},
        "data": {"name": task},
        "adapter": {"r": 4, "target_modules": "dense"},
    }
    return Record(
        run_info=RunInfo(created_at="", experiment_name="", train_config=config),
        train_info=TrainInfo(**{"status": "success", "metrics": [{}, {"test accuracy": accuracy}], **train}),
        meta_info=MetaInfo(model_info={}, dataset_info={}, package_info={}, system_info={}, pytorch_info=""),
    )
