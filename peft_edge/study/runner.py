"""Run the jobs of a study in worker processes, and format the results as a table."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm.auto import tqdm

from peft_edge.profiling.tables import text_table
from peft_edge.records import SUCCESS, CostRecord, Record
from peft_edge.study.jobs import Job, JobAttempt, RunJob
from peft_edge.training.evaluation import SOURCE, TARGET

# Seconds to wait for the lock of a job that another process is running.
_PATIENCE_S = 1.0
# The data loading processes of a killed run also hold its lock. They end within this number of seconds.
_KILLED_PATIENCE_S = 10.0


def run_grid(jobs: Sequence[Job], *, processes: int = 1, results: Path) -> None:
    """Run the jobs that are not finished, and copy all records into one folder.

    If a job fails or its process is killed, the failure is recorded, and the other jobs continue. The next call tries
    the failed job again. Several calls, on one or many machines, can share the jobs, because a process locks
    `<folder>.lock` while it runs a job. The system releases the lock if the process dies. When a call returns, this or
    another call has tried every job. The file system must support locks: a local disk or, for many machines, NFSv4,
    Lustre (mounted with `flock`) or GPFS, but not an object store.

    Args:
        jobs: The result of `read_grid`. `<folder>.log` contains the output of a job and the reason for a failure.
        processes: The maximum number of worker processes.
        results: The folder to which all records are copied, including records of failures. The copies lack local paths.

    Raises:
        ValueError: If a record is damaged. The message names the file.
        OSError: If a file cannot be read or written.
    """
    attempts = deque(JobAttempt(job, job.record, results) for job in _sources_first(jobs))
    attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
    workers = [_Worker() for _ in range(min(processes, len(attempts)))]
    num_failed = 0
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(attempts), desc="study", unit="job", smoothing=0)
    try:
        while attempts or any(worker.attempt for worker in workers):
            for worker in workers:
                if attempts and worker.attempt is None:
                    worker.begin(attempts.popleft())
            busy = [worker for worker in workers if worker.attempt]
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    attempt, was_tried = worker.end()
                    if was_tried:
                        num_failed += not attempt.job.is_finished
                    else:
                        attempts.append(replace(attempt, patience_s=_PATIENCE_S))
            # Other calls of `run_grid` may have finished some jobs by now.
            attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
            num_open = len(attempts) + sum(worker.attempt is not None for worker in workers)
            bar.set_postfix(failed=num_failed, refresh=False)
            bar.update(len(jobs) - num_open - bar.n)
    finally:
        bar.close()
        for worker in workers:
            worker.close()


def _sources_first(jobs: Sequence[Job]) -> list[Job]:
    """Move the first job of each `source` to the front, because other jobs with this source wait for its model."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.source, []).append(job)
    return [group[0] for group in groups.values()] + [job for group in groups.values() for job in group[1:]]


class _Worker:
    """A process that runs many attempts in turn, so that its slow imports run once. `begin` replaces a dead process."""

    def __init__(self) -> None:
        self.attempt: JobAttempt | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit threads and locks
        self.connection, child_connection = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_connection,))
        # A terminal sends Ctrl-C to all processes. Workers ignore this signal, and `run_grid` ends the workers.
        is_main = threading.current_thread() is threading.main_thread()  # only the main thread may set handlers
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        try:
            self._process.start()
        finally:
            if is_main:
                signal.signal(signal.SIGINT, previous)
        child_connection.close()

    def begin(self, attempt: JobAttempt) -> None:
        """Begin an attempt. `connection` is ready when the attempt has ended or the process has died."""
        if not self._process.is_alive():
            self._start()
        self.attempt = attempt
        with suppress(ConnectionError):  # the process has just died; `end` records its death
            self.connection.send(attempt)

    def end(self) -> tuple[JobAttempt, bool]:
        """Return the attempt and the result of `JobAttempt.run`, or raise the exception of that method.

        If the process died, record the failure, and return the attempt and the result of `JobAttempt.fail`.
        """
        assert self.attempt is not None
        attempt, self.attempt = self.attempt, None
        try:
            reply: bool | Exception = self.connection.recv()
        except (EOFError, OSError):  # the process died, and `fail` records the cause
            self._process.join()
            exit_code = self._process.exitcode or 0
            cause = f"its process ended with exit code {exit_code}"
            if exit_code < 0:
                name = signal.Signals(-exit_code).name
                cause = f"its process was killed ({name}), perhaps for lack of memory: run fewer at a time (--jobs)"
            return attempt, replace(attempt, patience_s=_KILLED_PATIENCE_S).fail(cause)
        if isinstance(reply, Exception):
            raise reply
        return attempt, reply

    def close(self) -> None:
        """End the process, and kill a running job. The next `run_grid` continues the job from its last checkpoint."""
        if self.attempt is not None:
            self._process.kill()
        self.connection.close()
        self._process.join()


def _serve(connection: Connection) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            attempt = connection.recv()
        except EOFError:  # `JobProcess.close` ends this process in this way
            return
        try:
            reply: bool | Exception = attempt.run()
        except (OSError, ValueError) as error:
            reply = error
        connection.send(reply)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# Each dict maps the column titles of a table to the number formats of the columns.
_RUN_COLUMNS = {
    "accuracy": ".3f",
    "source accuracy": ".3f",
    "retained": ".3f",
    "trained parameters": ",.0f",
    "saved bytes": ",.0f",
    "training seconds": ".1f",
    "training TFLOP": ".3g",
    "tensors MiB": ",.1f",
    "process MiB": ",.0f",
}
_COST_COLUMNS = {"peak MiB": ",.1f", "forward GFLOP": ",.2f", "backward GFLOP": ",.2f"}


def study_table(jobs: Sequence[Job]) -> str:
    """Return a text table of runs and one of cost analyses, each with one row per `setting`. Empty tables are left out.

    A cell contains the mean over the successful jobs ± its standard error, or only the mean if all values are equal.
    The standard error is the sample standard deviation divided by the square root of the number of values. The column
    `runs` or `analyses` contains the number of successful jobs and the statuses of other jobs. Training seconds include
    loading and storing; see `TrainingCosts`. The MiB are the peaks of the tensors in a step and of the process.
    """
    runs = [job for job in jobs if isinstance(job, RunJob)]
    analyses = [job for job in jobs if not isinstance(job, RunJob)]
    tables = [_table(runs, "runs", _RUN_COLUMNS), _table(analyses, "analyses", _COST_COLUMNS)]
    return "\n\n".join(table for table in tables if table)


def _table(jobs: Sequence[Job], title: str, columns: Mapping[str, str]) -> str:
    rows = [["", title, *columns]]
    for setting in dict.fromkeys(job.setting for job in jobs):
        group = [job for job in jobs if job.setting == setting]
        measured = [_measurements(job.record) for job in group if job.status == SUCCESS and job.record is not None]
        others = sorted({job.status for job in group} - {SUCCESS})
        cells = [_mean([row[index] for row in measured], style) for index, style in enumerate(columns.values())]
        rows.append([setting, ", ".join([str(len(measured)), *others]), *cells])
    return text_table(rows) if jobs else ""


def _measurements(record: Record | CostRecord) -> list[float | None]:
    if isinstance(record, CostRecord):
        cost = record.profile
        scaled = (cost.memory_peak_bytes, 2**20), (cost.flops_forward, 1e9), (cost.flops_backward, 1e9)
        return [None if value is None else value / unit for value, unit in scaled]
    info, last = record.train_info, record.train_info.metrics[-1]
    tensors = None if record.step is None else record.step.memory_peak_bytes
    flops, process = (None, None) if info.costs is None else (info.costs.flops, info.costs.process_peak_bytes)
    parts = (flops, 10**12), (tensors, 2**20), (process, 2**20)
    return [
        *(last[name] for name in (TARGET, SOURCE, "retention")),
        *(info.num_trainable_params, info.file_size, info.seconds),
        *(None if value is None else value / unit for value, unit in parts),
    ]


def _mean(values: Sequence[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.fmean(known), style)
    if len(set(known)) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(known) / len(known) ** 0.5, style)}"
