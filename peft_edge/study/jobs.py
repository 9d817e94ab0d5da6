"""Define the jobs of a study, and attempts at jobs. A lock ensures that only one process at a time attempts a job."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from peft_edge import training
from peft_edge._compat import reset_accelerator
from peft_edge.config import RunConfig
from peft_edge.files import remove
from peft_edge.hub.card import shareable
from peft_edge.records import DIVERGED, FAILED, SUCCESS, CostRecord, Record, add_record, read_record


@dataclass(frozen=True)
class Job(ABC):
    """A training run or cost analysis of a study.

    A job can be pickled, because its state is in files inside `folder` and next to `folder`.

    Attributes:
        setting: A description of the job without its seed. The results of jobs with the same setting are averaged.
        folder: The folder for the files of the job.
    """

    setting: str
    folder: Path

    @property
    def name(self) -> str:
        """The name of `folder`, which is unique in the study."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file `<folder>.log` with the output of the job and the reason for a failure."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    @abstractmethod
    def result_name(self) -> str:
        """The name, without `.json`, of the copy of the record in the results folder of the study."""

    @property
    def source(self) -> str:
        """A string that identifies the source model. While one job trains this model, other jobs with this key wait."""
        return self.name

    @property
    @abstractmethod
    def record(self) -> Record | CostRecord | None:
        """The record of the last attempt, or None if there is no record. A damaged record raises a `ValueError`."""

    @property
    def status(self) -> str:
        """The status in the record, or `not run` if there is no record."""
        record = self.record
        if record is None:
            return "not run"
        return record.train_info.status if isinstance(record, Record) else SUCCESS

    @property
    def is_finished(self) -> bool:
        """Whether the job succeeded or diverged. A diverged run is not repeated, because it would diverge again."""
        return self.status in (SUCCESS, DIVERGED)

    @abstractmethod
    def run(self) -> None:
        """Run the job, from its last checkpoint if there is one, and write a record. Raise an exception on failure."""

    @abstractmethod
    def record_failure(self, reason: str) -> None:
        """Write a failure record. Called if `run` wrote no record, for example because its process was killed."""


@dataclass(frozen=True)
class RunJob(Job):
    """A job that runs a configuration of `train.py`. The `output_dir` of the configuration is the folder of the job."""

    config: RunConfig

    @property
    def result_name(self) -> str:
        """The method and the name of the job, joined by `--`."""
        return f"{self.config.method}--{self.name}"

    @property
    def source(self) -> str:
        """The parts of the configuration that determine the source model, as a string."""
        config = self.config
        return repr((config.backbone, config.data, config.source, config.seed))

    @property
    def record(self) -> Record | None:
        """The newest record of this configuration, of a success or a failure. None if there is no such record."""
        # The recipe may have changed since the record was written. The folders may have moved, and are not compared.
        config = self.config.model_dump(exclude={"output_dir", "cache_dir"})
        found = filter(None, (read_record(folder / "record.json", Record) for folder in (self.folder, self._failure)))
        same = [record for record in found if config.items() <= record.run_info.train_config.items()]
        return max(same, key=lambda record: record.run_info.created_at, default=None)

    def run(self) -> None:
        """Call `training.run`, and delete the record of an earlier failure."""
        reset_accelerator()
        training.run(self.config)
        remove(self._failure)

    def record_failure(self, reason: str) -> None:
        """Write a record to `<folder>.failed`, because `folder` may be missing or belong to another run."""
        record = training.new_record(self.config, FAILED, started=time.time(), error_msg=reason)
        add_record(self._failure, "record", record)

    @property
    def _failure(self) -> Path:
        return self.folder.with_name(f"{self.name}.failed")


@dataclass(frozen=True)
class JobAttempt:
    """One attempt at `job`, under the lock `<folder>.lock`. The system releases the lock if the process dies.

    Attributes:
        before: The record when the study began, or None. If the record differs now, a process has tried the job since.
        results: The folder to which the record is copied.
        patience_s: Seconds to wait for the lock.
    """

    job: Job
    before: Record | CostRecord | None
    results: Path
    patience_s: float = 0.0

    def run(self) -> bool:
        """Run the job, unless the job is finished or a process has tried the job since the study began.

        Return False if another process holds the lock, and True otherwise, even if the job fails. Exceptions of the job
        are recorded. Only a damaged record (ValueError) or a failed write (OSError) raises an exception.
        """
        return self._with_lock(self._run)

    def fail(self, reason: str) -> bool:
        """Record `reason` as a failure, unless `run` would skip the job. Return and raise the same as `run`."""
        return self._with_lock(lambda: self._fail(reason))

    @property
    def is_kept(self) -> bool:
        """Whether the job is finished and `results` contains a copy of its record."""
        record = self.job.record
        return record is not None and self.job.is_finished and self._is_among_results(record)

    def _with_lock(self, action: Callable[[], None]) -> bool:
        try:
            with FileLock(self.job.folder.with_name(f"{self.job.name}.lock"), timeout=self.patience_s):
                if not self.job.is_finished and not self._has_new_record():
                    action()
                record = self.job.record
                if record is not None and not self._is_among_results(record):
                    add_record(self.results, self.job.result_name, _without_paths(record))
        except Timeout:  # another process runs this job
            return False
        return True

    def _run(self) -> None:
        try:
            with self.job.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
                self.job.run()
        except Exception as error:  # record any failure, so that the other jobs continue
            self._fail("".join(traceback.format_exception(error)))

    def _fail(self, reason: str) -> None:
        with self.job.log.open("a", encoding="utf-8") as log:
            log.write(f"{reason}\n")
        if not self._has_new_record():
            self.job.record_failure(reason)

    def _has_new_record(self) -> bool:
        record = self.job.record
        return record is not None and record != self.before

    def _is_among_results(self, record: Record | CostRecord) -> bool:
        file = self.results / f"{self.job.result_name}.json"
        try:
            return type(record).from_json(file.read_text(encoding="utf-8")) == _without_paths(record)
        except (FileNotFoundError, ValueError):  # a missing or damaged copy is written again
            return False


def _without_paths(record: Record | CostRecord) -> Record | CostRecord:
    return shareable(record) if isinstance(record, Record) else record
