"""Define `Job`, the base class for the training runs and cost analyses of a study, and `RunJob` for training runs."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from peft_edge import training
from peft_edge._compat import reset_accelerator
from peft_edge.config import RunConfig
from peft_edge.files import remove
from peft_edge.hub.card import shorten_paths
from peft_edge.records import DIVERGED, FAILED, SUCCESS, CostRecord, Record, add_record, read_record

J = TypeVar("J", bound="Job")
R = TypeVar("R", bound="RunJob")

_FOLDER_KEYS = {"output_dir", "cache_dir"}


@dataclass(frozen=True)
class Job(ABC):
    """A training run or cost analysis of a study.

    A job can be pickled and run in another process, because it keeps its progress and its results in files. These
    files are in `folder` or next to it.

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
        """The file name, without `.json`, under which the job's results are copied to the study's results folder."""

    @property
    def failed_folder(self) -> Path:
        """The folder `<folder>.failed`, to which a record of the failure is written if the job fails.

        This record is not written to `folder`, because `folder` may contain the results of a run with another
        configuration, and these must not be overwritten.
        """
        return self.folder.with_name(f"{self.name}.failed")

    @property
    def source(self) -> str | None:
        """A string that identifies the source model of the job. None if the job has no source model.

        The source model is the network before adaptation. Jobs with the same string share one source model.
        """
        return None

    @property
    def num_threads(self) -> int:
        """The number of CPU cores that the job uses."""
        return 1

    @property
    @abstractmethod
    def record(self) -> Record | CostRecord | None:
        """The newest record (results) of the job, or None if there is none. A damaged record raises a `ValueError`."""

    @property
    def status(self) -> str:
        """The status in `record`, or `not run` if there is no record.

        The record of a cost analysis contains no status. If there is such a record, the status of the job is `success`.
        """
        record = self.record
        if record is None:
            return "not run"
        return record.train_info.status if isinstance(record, Record) else SUCCESS

    @property
    def is_finished(self) -> bool:
        """Whether the job succeeded or diverged. A diverged run is not repeated, because it would diverge again."""
        return self.status in (SUCCESS, DIVERGED)

    def moved_to(self: J, output_dir: Path) -> J:
        """Return a copy of the job with a folder of the same name in `output_dir`. No files are moved."""
        return replace(self, folder=output_dir / self.name)

    def attempt(self) -> None:
        """Run the job, and write its output to `log`. If the job fails, append the traceback to `log`.

        After a failure, also call `record_failure`, unless `run` itself has already written a new record.

        Raises:
            ValueError: If a record of the job is damaged.
            OSError: If the log or the record of a failure cannot be written.
        """
        before = self.record
        try:
            with self.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
                self.run()
        except (Exception, SystemExit) as error:  # record any failure, so that the other jobs continue
            reason = "".join(traceback.format_exception(error))
            self.append_to_log(f"{reason}\n")
            if self.record == before:
                self.record_failure(reason)

    def append_to_log(self, text: str) -> None:
        """Append `text` to `log`."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text)

    @abstractmethod
    def check_folder(self) -> None:
        """Raise a `ValueError` if `folder` contains files that do not belong to this job."""

    @abstractmethod
    def train_source(self) -> None:
        """Train the source model (the network before adaptation), and write it to the study's folder `cache`.

        Do nothing if this folder contains the source model, or if the job has no source model.
        """

    @abstractmethod
    def run(self) -> None:
        """Start the job or continue it from its last checkpoint. Write its record. On failure, raise an exception."""

    @abstractmethod
    def record_failure(self, reason: str) -> None:
        """Record that the job failed with `reason`, for example because its process was killed."""


@dataclass(frozen=True)
class RunJob(Job):
    """A training run as a job of a study. `config` is the configuration of the run; `config.output_dir` is `folder`."""

    config: RunConfig

    @property
    def result_name(self) -> str:
        """The method and the job's name, joined by `--`.

        The record (results) of the job is copied to the study's results folder as `<result_name>.json`.
        """
        return f"{self.config.method}--{self.name}"

    @property
    def source(self) -> str:
        """A string with the configuration values that determine the source model (the network before adaptation)."""
        config = self.config
        return repr((config.backbone, config.data, config.source, config.seed, config.num_threads, config.cpu))

    @property
    def num_threads(self) -> int:
        """The configuration's `num_threads`."""
        return self.config.num_threads

    @property
    def record(self) -> Record | None:
        """The newest record (results) of a run with this job's configuration. None if there is no such record.

        The record is in `folder` or in `failed_folder`.
        """
        found = filter(
            None, (read_record(folder / "record.json", Record) for folder in (self.folder, self.failed_folder))
        )
        return max(filter(self.has_record, found), key=lambda record: record.run_info.created_at, default=None)

    def has_record(self, record: Record) -> bool:
        """Return whether `record` is the record of a run with this job's configuration.

        `output_dir` and `cache_dir` are not compared. A record has another configuration, for example, if a
        configuration file was edited after the run.
        """
        return self._settings.items() <= record.run_info.train_config.items()

    def has_copy(self, copy: Record) -> bool:
        """Return whether `copy`, a result of `shareable`, is the record of a run with this job's configuration.

        Of each local path, only the last component is compared, because `shareable` has removed the rest. Keys that the
        copy lacks are not compared, because an older version of this package, without these keys, may have written the
        copy.
        """
        settings = self.config.model_dump(mode="json", exclude=_FOLDER_KEYS)
        found = copy.run_info.train_config
        return all(found[key] == shorten_paths(value, key) for key, value in settings.items() if key in found)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The configuration without `output_dir` and `cache_dir`, because these folders may be moved after a run."""
        return self.config.model_dump(exclude=_FOLDER_KEYS)

    def moved_to(self: R, output_dir: Path) -> R:
        """Return a copy of the job with folder and cache in `output_dir`. Keep the folder's name, and move no files."""
        folder = output_dir / self.name
        folders = {"output_dir": str(folder), "cache_dir": str(output_dir / "cache")}
        return replace(self, folder=folder, config=self.config.model_copy(update=folders))

    def check_folder(self) -> None:
        """Raise a `ConfigError` if `folder` holds results of another configuration, or unrelated files."""
        training.is_started(self.config, self.folder)

    def train_source(self) -> None:
        """Train the source model (the network before adaptation), and write it to `cache_dir` of the configuration.

        If this folder contains the source model already, only load it.
        """
        reset_accelerator()
        training.train_source(self.config)

    def run(self) -> None:
        """Run the training that `config` describes, and then delete the record of an earlier failure."""
        reset_accelerator()
        training.run(self.config)
        remove(self.failed_folder)

    def record_failure(self, reason: str) -> None:
        """Write a record with the error message `reason` to `failed_folder`."""
        record = training.new_record(self.config, FAILED, started=time.time(), error_msg=reason)
        add_record(self.failed_folder, "record", record)
