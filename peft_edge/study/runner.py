"""Does the cells of a study: in processes side by side, and together with other studies in the same folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm.auto import tqdm

from peft_edge.study.attempts import Attempt
from peft_edge.study.cells import Cell

# Of a process that has nothing left to do but what another study has claimed.
_PATIENCE_S = 1.0
# After these, the processes that read images for a run have noticed that it was killed, and hold its claim no longer.
_LAST_CLAIM_S = 10.0


def run_grid(cells: Sequence[Cell], *, jobs: int = 1, results: Path) -> None:
    """Does what is not finished, and puts every record into an archive.

    A cell that fails, or whose process is killed, leaves a record that says so, and the others go on; the next call
    tries it again. Several calls may share the work, on one machine or on many: a cell is done by the one that holds
    the system's lock on `<folder>.lock`, which is free again when its holder dies, and whichever call returns, all
    cells have been tried. So the folders must be where all these processes see each other's locks: on a local disk or,
    for many machines, on NFSv4, Lustre (mounted with `flock`) or GPFS; not on an object store.

    Args:
        cells: From `read_grid`. What each prints, and why it failed, is in `<folder>.log`.
        jobs: Processes that this call does them in.
        results: The archive, which gets the records of all cells, whatever has become of them.

    Raises:
        ValueError: A record is damaged; the message names the file.
        OSError: A file cannot be written.
    """
    attempts = deque(Attempt(cell, cell.record, results) for cell in _sources_first(cells))
    attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
    workers = [_Worker() for _ in range(min(jobs, len(attempts)))]
    num_failed = 0
    bar = tqdm(total=len(cells), initial=len(cells) - len(attempts), desc="study", unit="cell", smoothing=0)
    try:
        while attempts or any(worker.attempt is not None for worker in workers):
            for worker in workers:
                if attempts and worker.attempt is None:
                    worker.begin(attempts.popleft())
            for worker in _over(workers):
                attempt, is_settled = worker.end()
                if is_settled:
                    num_failed += not attempt.cell.is_finished
                else:
                    attempts.append(replace(attempt, patience_s=_PATIENCE_S))
            # Other studies may have finished some in the meantime.
            attempts = deque(attempt for attempt in attempts if not attempt.is_kept)
            num_open = len(attempts) + sum(worker.attempt is not None for worker in workers)
            bar.set_postfix(failed=num_failed, refresh=False)
            bar.update(len(cells) - num_open - bar.n)
    finally:
        bar.close()
        for worker in workers:
            worker.close()


def _over(workers: Sequence[_Worker]) -> list[_Worker]:
    """Waits until at least one of those at work is done, and returns these."""
    busy = [worker for worker in workers if worker.attempt is not None]
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def _sources_first(cells: Sequence[Cell]) -> list[Cell]:
    """One cell of each source before the others, which would wait for it to be made."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.source, []).append(cell)
    first = [group.pop(0) for group in groups.values()]
    return first + [cell for group in groups.values() for cell in group]


class _Worker:
    """A process that makes one attempt after another, since its imports take seconds; renewed when it was killed."""

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self._start()

    def _start(self) -> None:
        # Threads and locks of this process must not be copied into the other.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        with _interrupts_ignored():
            self._process.start()
        theirs.close()

    def begin(self, attempt: Attempt) -> None:
        """Makes an attempt; `connection` is ready when it is over."""
        if not self._process.is_alive():
            self._start()
        self.attempt = attempt
        with suppress(ConnectionError):  # the process has just died: `end` sees to that
            self.connection.send(attempt)

    def end(self) -> tuple[Attempt, bool]:
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
    """Ends this process when the study's is killed, which would otherwise leave it to finish its cell alone."""
    study = multiprocessing.parent_process()
    assert study is not None
    study.join()
    os._exit(1)


def _cause_of_death(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process that did it ended by itself, with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the process that did it was killed ({name}), perhaps for want of memory: run fewer side by side (--jobs)"
