"""What a study does, one thing at a time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState

from peft_edge import training
from peft_edge.archive import add_record
from peft_edge.config import RunConfig
from peft_edge.files import remove
from peft_edge.records import DIVERGED, SUCCESS, CostRecord, Record


@dataclass(frozen=True)
class Cell(ABC):
    """One thing to do. It can be pickled, and all that is known of it lies in its folder and beside it."""

    setting: str
    """What is done, apart from the seed: cells of one setting are averaged."""

    folder: Path
    """Where what comes of it is kept."""

    @property
    def name(self) -> str:
        """What tells it from every other cell of the study."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file of what it prints, and of why it failed."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    @abstractmethod
    def result_name(self) -> str:
        """What its record is called among the results of a study."""

    @property
    def source(self) -> str:
        """What it shares with other cells, which wait while one of them makes it."""
        return self.name

    @property
    @abstractmethod
    def record(self) -> Record | CostRecord | None:
        """What came of it the last time; None if nothing is known.

        Raises:
            ValueError: The record is damaged; the message names the file.
        """

    @property
    def status(self) -> str:
        """What became of it: the record's status, or `not run`."""
        record = self.record
        if record is None:
            return "not run"
        return record.train_info.status if isinstance(record, Record) else SUCCESS

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do. What has diverged would do so again."""
        return self.status in (SUCCESS, DIVERGED)

    @abstractmethod
    def run(self) -> None:
        """Does it, and leaves the record; what was begun before is gone on with.

        Raises:
            Exception: It failed, whatever the reason; the record may say so already.
        """

    @abstractmethod
    def record_failure(self, reason: str) -> None:
        """Leaves a record of a failure that has left none: of a process that was killed, or of a run not begun.

        A kind of cell whose records know no failure does nothing here; the reason stands in the log.
        """


@dataclass(frozen=True)
class RunCell(Cell):
    """A run of `train.py`."""

    config: RunConfig
    """Its configuration; `output_dir` is the folder."""

    @property
    def result_name(self) -> str:
        """The run's `experiment_name`, as the name of a file."""
        return f"{self.config.method}--{self.name}"

    @property
    def source(self) -> str:
        """What decides on the source model."""
        config = self.config
        return repr((config.backbone, config.data, config.source, config.seed))

    @property
    def record(self) -> Record | None:
        """What came of it the last time; None if nothing is known.

        Raises:
            ValueError: The record is damaged; the message names the file.
        """
        found = [training.read_record(folder) for folder in (self.folder, self._failure)]
        ours = [record for record in found if record is not None and self._is_ours(record)]
        return max(ours, key=lambda record: record.run_info.created_at, default=None)

    def run(self) -> None:
        """See `training.run`."""
        # Accelerate keeps the settings of the run before.
        AcceleratorState._reset_state(reset_partial_state=True)
        training.run(self.config)
        remove(self._failure)

    def record_failure(self, reason: str) -> None:
        """Writes a record beside the folder, which may not have been begun, or hold another run."""
        add_record(self._failure, "record", training.failed_record(self.config, reason, started=time.time()))

    @property
    def _failure(self) -> Path:
        return self.folder.with_name(f"{self.name}.failed")

    def _is_ours(self, record: Record) -> bool:
        # A folder may hold a run of the same name from before a recipe was changed, and it may have been moved.
        asked = self.config.model_dump(exclude={"output_dir", "cache_dir"})
        done = record.run_info.train_config
        return {**done, **asked} == done
