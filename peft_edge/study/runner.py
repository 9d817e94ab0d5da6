"""Does the jobs of a study: in processes side by side, and together with other studies in the same folder.

What came of a study, as one table of its runs and one of its analyses.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from peft_edge.profiling.tables import text_table
from peft_edge.records import SUCCESS
from peft_edge.study.jobs import Job, JobAttempt, RunJob
from peft_edge.training.evaluation import SOURCE, TARGET

# Of a process that has nothing left to do but what another study has lock_output_dir.
_PATIENCE_S = 1.0
# After these, the processes that read images for a run have noticed that it was killed, and hold its claim no longer.
_LAST_CLAIM_S = 10.0


def run_grid(jobs: Sequence[Job], *, processes: int = 1, results: Path) -> None:
    """Does what is not finished, and puts every record into an archive.

    A job that fails, or whose process is killed, leaves a record that says so, and the others go on; the next call
    tries it again. Several calls may share the work, on one machine or on many: a job is done by the one that holds
    the system's lock on `<folder>.lock`, which is free again when its holder dies, and whichever call returns, all
    jobs have been tried. So the folders must be where all these processes see each other's locks: on a local disk or,
    for many machines, on NFSv4, Lustre (mounted with `flock`) or GPFS; not on an object store.

    Args:
        jobs: From `read_grid`. What each prints, and why it failed, is in `<folder>.log`.
        processes: Processes that this call does them in.
        results: The archive, which gets the records of all jobs, whatever has become of them.

    Raises:
        ValueError: A record is damaged; the message names the file.
        OSError: A file cannot be written.
    """
    attempts = deque(JobAttempt(job, job.record, results) for job in _sources_first(jobs))
    attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
    workers = [_Worker() for _ in range(min(processes, len(attempts)))]
    num_failed = 0
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(attempts), desc="study", unit="job", smoothing=0)
    try:
        while attempts or any(worker.attempt is not None for worker in workers):
            for worker in workers:
                if attempts and worker.attempt is None:
                    worker.begin(attempts.popleft())
            for worker in _over(workers):
                attempt, is_settled = worker.end()
                if is_settled:
                    num_failed += not attempt.job.is_finished
                else:
                    attempts.append(replace(attempt, patience_s=_PATIENCE_S))
            # Other studies may have finished some in the meantime.
            attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
            num_open = len(attempts) + sum(worker.attempt is not None for worker in workers)
            bar.set_postfix(failed=num_failed, refresh=False)
            bar.update(len(jobs) - num_open - bar.n)
    finally:
        bar.close()
        for worker in workers:
            worker.close()


def _over(workers: Sequence[_Worker]) -> list[_Worker]:
    """Waits until at least one of those at work is done, and returns these."""
    busy = [worker for worker in workers if worker.attempt is not None]
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def _sources_first(jobs: Sequence[Job]) -> list[Job]:
    """One job of each source before the others, which would wait for it to be made."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.source, []).append(job)
    first = [group.pop(0) for group in groups.values()]
    return first + [job for group in groups.values() for job in group]


class _Worker:
    """A process that makes one attempt after another, since its imports take seconds; renewed when it was killed."""

    def __init__(self) -> None:
        self.attempt: JobAttempt | None = None
        self._start()

    def _start(self) -> None:
        # Threads and locks of this process must not be copied into the other.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        with _interrupts_ignored():
            self._process.start()
        theirs.close()

    def begin(self, attempt: JobAttempt) -> None:
        """Makes an attempt; `connection` is ready when it is over."""
        if not self._process.is_alive():
            self._start()
        self.attempt = attempt
        with suppress(ConnectionError):  # the process has just died: `end` sees to that
            self.connection.send(attempt)

    def end(self) -> tuple[JobAttempt, bool]:
        """Returns the attempt, and what its `run` has returned; raises what that has raised."""
        assert self.attempt is not None
        attempt, self.attempt = self.attempt, None
        try:
            reply = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            cause = _cause_of_death(self._process.exitcode or 0)
            return attempt, replace(attempt, patience_s=_LAST_CLAIM_S).fail(cause)
        if isinstance(reply, Exception):
            raise reply
        return attempt, reply

    def close(self) -> None:
        """Ends the process; one that is at work leaves what a killed study leaves, and the next call goes on with."""
        if self.attempt is not None:
            self._process.kill()
        self.connection.close()
        self._process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started here ignores Ctrl-C, which reaches every process of a terminal: the study ends it itself."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does, and only it is interrupted
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _serve(connection: Connection) -> None:
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    while True:
        try:
            attempt = connection.recv()
        except EOFError:
            return
        try:
            reply: bool | Exception = attempt.run()
        except (OSError, ValueError) as error:
            reply = error
        connection.send(reply)


def _end_with_the_study() -> None:
    """Ends this process when the study's is killed, which would otherwise leave it to finish its job alone."""
    study = multiprocessing.parent_process()
    assert study is not None
    study.join()
    os._exit(1)


def _cause_of_death(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process that did it ended by itself, with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the process that did it was killed ({name}), perhaps for want of memory: run fewer side by side (--jobs)"


# The title of a column, how its figures are written, and where they stand in a record.
_Columns = Mapping[str, tuple[str, Callable[[Any], float | None]]]

_RUN_COLUMNS: _Columns = {
    "accuracy": (".3f", lambda record: record.train_info.metrics[-1][TARGET]),
    "source accuracy": (".3f", lambda record: record.train_info.metrics[-1][SOURCE]),
    "retained": (".3f", lambda record: record.train_info.metrics[-1]["retention"]),
    "trained parameters": (",.0f", lambda record: record.train_info.num_trainable_params),
    "saved bytes": (",.0f", lambda record: record.train_info.file_size),
    "training seconds": (".1f", lambda record: record.train_info.train_time),
}
_COST_COLUMNS: _Columns = {
    "peak MiB": (",.1f", lambda record: _scaled(record.profile.memory_peak_bytes, 2**20)),
    "forward GFLOP": (",.2f", lambda record: _scaled(record.profile.flops_forward, 1e9)),
    "backward GFLOP": (",.2f", lambda record: _scaled(record.profile.flops_backward, 1e9)),
}


def study_table(jobs: Sequence[Job]) -> str:
    """Returns a line for each setting as text: the mean over the seeds, and with several their standard deviation.

    The first column says how many jobs have succeeded, and what became of the others.
    """
    runs = [job for job in jobs if isinstance(job, RunJob)]
    costs = [job for job in jobs if not isinstance(job, RunJob)]
    tables = [_table(runs, "runs", _RUN_COLUMNS), _table(costs, "analyses", _COST_COLUMNS)]
    return "\n\n".join(table for table in tables if table)


def _table(jobs: Iterable[Job], title: str, columns: _Columns) -> str:
    settings: dict[str, list[Job]] = {}
    for job in jobs:
        settings.setdefault(job.setting, []).append(job)
    rows = []
    for setting, group in settings.items():
        finished = [job.record for job in group if job.status == SUCCESS]
        others = {job.status for job in group} - {SUCCESS}
        figures = [_mean([value(record) for record in finished], style) for style, value in columns.values()]
        rows.append([setting, ", ".join([str(len(finished)), *sorted(others)]), *figures])
    return text_table([["", title, *columns], *rows]) if rows else ""


def _mean(values: Sequence[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.fmean(known), style)
    return mean if len(set(known)) == 1 else f"{mean} ± {format(statistics.stdev(known), style)}"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
