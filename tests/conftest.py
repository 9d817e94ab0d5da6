"""Set up every test without network, with one thread and a fixed seed. Define fixtures that several folders use."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The libraries below read these variables once, when they are imported, so the variables are set first. Child
# processes inherit the variables.
_hf_home = tempfile.TemporaryDirectory(prefix="peft-edge-tests-")
os.environ.update(
    HF_HOME=_hf_home.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from torch import nn  # noqa: E402
from transformers import TrainingArguments, set_seed  # noqa: E402

from peft_edge.records import MetaInfo, Record, RunInfo, TrainInfo  # noqa: E402
from tests.processes import FORK_OF_SERVER  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exclude the objects that the imports created from garbage collection.

    With these objects, each garbage collection would take half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    _hf_home.cleanup()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Set the random seeds of Python, NumPy and torch before every test."""
    set_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Reset Accelerate and torch's number of threads after every test.

    Without the reset, Accelerate would keep the settings of the first run for the whole process.
    """
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the worker processes of a study or a benchmark as forks of a server that has already imported torch.

    Without this fixture, each worker process would import torch, which takes seconds.
    """
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORK_OF_SERVER)


@pytest.fixture
def tiny_backbone() -> nn.Module:
    """Return a MobileNetV2 with 0.4 M random parameters and ten classes, in eval mode."""
    return timm.create_model("mobilenetv2_035", num_classes=10).eval()


@pytest.fixture
def images() -> torch.Tensor:
    """Return four random images of 32 x 32 pixels."""
    return torch.randn(4, 3, 32, 32)


@pytest.fixture
def trainer_arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Return a function that creates `TrainingArguments`: three steps on the CPU, without checkpoints and trackers."""

    def make(**options: object) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            **options,
        )

    return make


@pytest.fixture
def record() -> Callable[..., Record]:
    """Return a function that creates the record of a run that has succeeded."""
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
