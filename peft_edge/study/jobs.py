"""What a study does, one thing at a time.

One try at a job: lock_output_dir, so that no two processes make it, and written down, whatever comes of it.
"""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout

from peft_edge import training
from peft_edge.config import RunConfig
from peft_edge.files import remove
from peft_edge.hub.card import shareable
from peft_edge.records import DIVERGED, FAILED, SUCCESS, CostRecord, Record, add_record, read_record


@dataclass(frozen=True)
class Job(ABC):
    """One thing to do. It can be pickled, and all that is known of it lies in its folder and beside it."""

    setting: str
    """What is done, apart from the seed: jobs of one setting are averaged."""

    folder: Path
    """Where what comes of it is kept."""

    @property
    def name(self) -> str:
        """What tells it from every other job of the study."""
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
        """What it shares with other jobs, which wait while one of them makes it."""
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

        A kind of job whose records know no failure does nothing here; the reason stands in the log.
        """


@dataclass(frozen=True)
class RunJob(Job):
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
        found = [read_record(folder / "record.json", Record) for folder in (self.folder, self._failure)]
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
        record = training.new_record(self.config, FAILED, started=time.time(), error_msg=reason)
        add_record(self._failure, "record", record)

    @property
    def _failure(self) -> Path:
        return self.folder.with_name(f"{self.name}.failed")

    def _is_ours(self, record: Record) -> bool:
        # A folder may hold a run of the same name from before a recipe was changed, and it may have been moved.
        asked = self.config.model_dump(exclude={"output_dir", "cache_dir"})
        done = record.run_info.train_config
        return {**done, **asked} == done


@dataclass(frozen=True)
class JobAttempt:
    """One try at a job, which a process claims with a lock on `<folder>.lock` and loses when it dies."""

    job: Job
    """What is tried."""

    before: Record | CostRecord | None
    """Its record when the study began: another one means that another process has tried it since."""

    results: Path
    """The archive that gets its record."""

    patience_s: float = 0.0
    """Seconds to wait for a job that another process has lock_output_dir."""

    def run(self) -> bool:
        """Does the job, unless another process has done so since the study began.

        Returns:
            Whether it has been tried, by whomever. If not, another process has it.

        Raises:
            ValueError: A record is damaged; the message names the file.
            OSError: A file cannot be written.
        """
        return self._claimed(self._run)

    def fail(self, reason: str) -> bool:
        """Writes down that the process which did the job has died; returns and raises what `run` does."""
        return self._claimed(lambda: self._fail(reason))

    def _claimed(self, do: Callable[[], None]) -> bool:
        try:
            with FileLock(self.job.folder.with_name(f"{self.job.name}.lock"), timeout=self.patience_s):
                if not self.job.is_finished and not self._left_a_record():
                    do()
                record = self.job.record
                if record is not None and not self._is_among_results(record):
                    add_record(self.results, self.job.result_name, _public(record))
        except Timeout:
            return False
        return True

    def _run(self) -> None:
        try:
            with self.job.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
                self.job.run()
        except Exception as error:
            # Whatever it is, it is written down, and the others go on.
            self._fail("".join(traceback.format_exception(error)))

    def _fail(self, reason: str) -> None:
        with self.job.log.open("a", encoding="utf-8") as log:
            print(reason, file=log)
        if not self._left_a_record():
            self.job.record_failure(reason)

    def _left_a_record(self) -> bool:
        record = self.job.record
        return record is not None and record != self.before

    @property
    def is_kept(self) -> bool:
        """Whether the job is finished, and its record is among the results."""
        record = self.job.record
        return record is not None and self.job.is_finished and self._is_among_results(record)

    def _is_among_results(self, record: Record | CostRecord) -> bool:
        file = self.results / f"{self.job.result_name}.json"
        try:
            return type(record).from_json(file.read_text(encoding="utf-8")) == _public(record)
        except (FileNotFoundError, ValueError):
            return False


def _public(record: Record | CostRecord) -> Record | CostRecord:
    """Results are shown to others, whom the paths of this machine do not concern."""
    return shareable(record) if isinstance(record, Record) else record
