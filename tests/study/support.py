"""Jobs that train nothing and end as the test chooses, and a grid of short runs."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_edge.config import RunConfig
from peft_edge.records import DIVERGED, SUCCESS, MetaInfo, Record, RunInfo, TrainInfo, add_record
from peft_edge.study.jobs import RunJob


def record_of(config: RunConfig, status: str = SUCCESS, created_at: str = "") -> Record:
    return Record(
        run_info=RunInfo(
            created_at=created_at or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            experiment_name=f"{config.method}/{Path(config.output_dir).name}",
            train_config={"model_id": config.backbone.name, **config.model_dump()},
        ),
        train_info=TrainInfo(status=status),
        meta_info=MetaInfo(model_info={}, dataset_info={}, package_info={}, system_info={}, pytorch_info=""),
    )


@dataclass(frozen=True)
class FakeJob(RunJob):
    """A job of a study that trains nothing. It takes `seconds`, and `ending` chooses how it ends.

    `ending` is `success`, `diverged`, `error`, `exit`, `memory`, `killed` or `damaged` (an unreadable record).
    """

    ending: str = SUCCESS
    seconds: float = 0.0

    def train_source(self) -> None:
        weights = self.folder.parent / "cache" / "sources" / "trained" / "weights"
        weights.parent.mkdir(parents=True)
        weights.write_text(uuid.uuid4().hex)

    def run(self) -> None:
        for weights in self.folder.parent.glob("cache/sources/*/weights"):
            print(f"source {weights.read_text()}")
        with (self.folder.parent / "done.txt").open("a") as file:
            file.write(f"{self.name}\n")
        print(f"this is {self.name}")
        time.sleep(self.seconds)
        if self.ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ending == "memory":
            # With this limit, the allocation fails as on a machine without free memory.
            resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.RLIM_INFINITY))
            bytearray(2**34)
        if self.ending == "exit":
            sys.exit(143)
        if self.ending == "damaged":
            self.folder.mkdir()
            (self.folder / "record.json").write_text("{")
        if self.ending in (SUCCESS, DIVERGED):
            add_record(self.folder, "record", record_of(self.config, self.ending))
        if self.ending != SUCCESS:
            raise RuntimeError(f"{self.name} fails")


def fake_job(folder: Path, ending: str = SUCCESS, seconds: float = 0.0, seed: int = 0) -> FakeJob:
    return FakeJob(folder.name, folder, RunConfig(output_dir=str(folder), seed=seed), ending, seconds)


SMALL = """
recipes: [[task.yaml]]
grid: {seed: [0, 1]}
"""
SMALL_TASK = """
backbone: {name: test_efficientnet}
data: {name: %s, shift: invert, image_size: 16}
source: {epochs: 1, batch_size: 8}
training: {epochs: 10, batch_size: 4, warmup_steps: 0, checkpoint_every_steps: 1, learning_rate: [0.01]}
cpu: true
trackers: []
"""


def small_grid(folder: Path, seeds: str = "[0, 1]") -> Path:
    """Write the file of a grid of short runs and 36 random images, and return the path of the file.

    Each run takes about a second.
    """
    random = np.random.default_rng(0)
    for number in range(36):
        file = folder / "images" / "abc"[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    (folder / "task.yaml").write_text(SMALL_TASK % (folder / "images"))
    (folder / "grid.yaml").write_text(SMALL.replace("[0, 1]", seeds))
    return folder / "grid.yaml"


def reproducible(value: Any) -> Any:
    """Return `value` without the entries that differ between equal runs.

    These are dates, times, folders, the memory of processes, the number of sampled steps, and the state of huge pages.
    """
    if isinstance(value, dict):
        return {key: reproducible(entry) for key, entry in value.items() if not is_volatile(key)}
    # PEFT keeps the names of layers in a set, so their order in the record varies.
    is_set = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(value) if is_set else list(map(reproducible, value)) if isinstance(value, list) else value


def is_volatile(key: str) -> bool:
    folders_and_figures = ("created_at", "output_dir", "cache_dir", "base_model_name_or_path", "huge_pages")
    if key == "steps":
        return True  # a resumed run measures the times of one more step
    return key.endswith(("_s", "_time", " time", "peak_rss_bytes", "process_peak_bytes")) or key in folders_and_figures


def done_in(folder: Path) -> Sequence[str]:
    """Return the names of the jobs that were started, in the order of their starts."""
    file = folder / "done.txt"
    return file.read_text().splitlines() if file.exists() else []
