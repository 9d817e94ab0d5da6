"""Jobs without training, whose outcome the test chooses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

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
    """A run without training that takes `seconds` and then ends as `ending` says.

    `ending` is `success`, `diverged`, `error`, `killed` or `damaged` (an unreadable record).
    """

    ending: str = SUCCESS
    seconds: float = 0.0

    def run(self) -> None:
        with (self.folder.parent / "done.txt").open("a") as file:
            file.write(f"{self.name}\n")
        print(f"this is {self.name}")
        time.sleep(self.seconds)
        if self.ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ending == "damaged":
            self.folder.mkdir()
            (self.folder / "record.json").write_text("{")
        if self.ending in (SUCCESS, DIVERGED):
            add_record(self.folder, "record", record_of(self.config, self.ending))
        if self.ending != SUCCESS:
            raise RuntimeError(f"{self.name} fails")


def fake_job(folder: Path, ending: str = SUCCESS, seconds: float = 0.0, seed: int = 0) -> FakeJob:
    return FakeJob(folder.name, folder, RunConfig(output_dir=str(folder), seed=seed), ending, seconds)


def done_in(folder: Path) -> Sequence[str]:
    """Return the names of the jobs that were begun, in their order."""
    file = folder / "done.txt"
    return file.read_text().splitlines() if file.exists() else []
