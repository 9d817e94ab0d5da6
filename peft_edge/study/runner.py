"""Run the jobs of a study in worker processes or on a cluster, and format the results as a table."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pebble import ProcessExpired, ProcessPool
from tqdm import std
from tqdm.auto import tqdm

from peft_edge.hub.card import shareable
from peft_edge.profiling.tables import text_table
from peft_edge.records import DIVERGED, SUCCESS, CostRecord, Record, UnknownFieldError, add_record, read_record
from peft_edge.study.cluster import Cluster
from peft_edge.study.jobs import Job, RunJob
from peft_edge.training.evaluation import SOURCE, TARGET, TARGET_BEFORE

C = TypeVar("C", bound=Record | CostRecord)


def run_grid(jobs: Sequence[Job], *, processes: int = 1, results: Path, cluster: Cluster | None = None) -> None:
    """Run the jobs that are not finished, and copy the records (results) of all jobs into one folder.

    If a job fails or its process is killed, the reason is written to its log, and the other jobs continue. A failed
    training run also gets a record of the failure. The next call tries the failed job again. Ctrl-C kills the running
    jobs; the next call continues them from their last checkpoints. A run that has succeeded is not repeated, even if
    its name has changed because values were added to the grid.

    Args:
        jobs: The result of `read_grid`. The log of a job is the file `<job.folder>.log`. It contains the output of the
            job, and the reason for a failure.
        processes: The maximum number of worker processes on this machine. Not used with `cluster`.
        results: The folder to which all records are copied, including records of failures. In the copies, local paths
            are shortened to their last component.
        cluster: A Ray cluster that runs the jobs. If it is None, processes on this machine run them.

    Raises:
        ValueError: If another call is working in the output folder, which is the parent of the jobs' folders. If a
            record is damaged. If `results` contains the record of a finished run that has the name of one of `jobs`,
            but a configuration that differs from that of the job. This last check is skipped if `results` is a direct
            subfolder of the output folder. The message names the folder or file.
        OSError: If a file cannot be read or written, a worker process cannot start, or the cluster cannot be reached.
    """
    if not jobs:
        return
    output_dir = jobs[0].folder.parent
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output_dir / ".study.lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another study is working in {output_dir}: wait for its end, or choose another --output-dir"
        ) from error
    with lock:
        if results.resolve().parent != output_dir.resolve():
            _check_results(jobs, results)
        _rename_earlier_runs(jobs, output_dir, results)
        unfinished = _sources_first([job for job in jobs if not job.is_finished])
        for job in jobs:
            _copy_record(job, results)
        num_failed = 0
        with tqdm(total=len(jobs), initial=len(jobs) - len(unfinished), desc="study", unit="job", smoothing=0) as bar:
            if unfinished and cluster is None:
                # The first runs also train their source models. The bar does not move until the first run has ended,
                # which may take long.
                bar.set_postfix_str(f"output of the first job: {unfinished[0].log}")
            ended = _run_in_pool(unfinished, processes) if cluster is None else cluster.run(unfinished, bar)
            with closing(ended):
                for job, cause in ended:
                    if cause is not None and not job.is_finished:
                        job.append_to_log(f"{cause}\n")
                        job.record_failure(cause)
                    _copy_record(job, results)
                    num_failed += not job.is_finished
                    bar.set_postfix(failed=num_failed, refresh=False)
                    bar.update()


def _check_results(jobs: Sequence[Job], results: Path) -> None:
    """Raise a `ValueError` if a finished run in `results` has the name of a job, but another configuration."""
    others = []
    for job in jobs:
        if isinstance(job, RunJob):
            copy = _read_copy(results, job, Record)
            if copy is not None and copy.train_info.status in (SUCCESS, DIVERGED) and not job.has_copy(copy):
                others.append(f"{job.result_name}.json")
    if others:
        raise ValueError(
            f"{results} contains finished runs with the names of runs of this study and other configurations, perhaps "
            f"of another study: choose another folder with --results, or delete {', '.join(others)} there"
        )


def _rename_earlier_runs(jobs: Sequence[Job], output_dir: Path, results: Path) -> None:
    """Find earlier successful runs with the configuration of a job but another name, and give them the job's name.

    The jobs then count as finished, and are not run again. The name of a run contains the values of the keys that the
    grid varies. When a grid gets a second value for a key, the names of its runs change, but not their configurations.
    The function renames the folder and the log of a run. If `results` contains a copy of the run's record under the
    earlier name, the function deletes this copy.
    """
    names = {job.name for job in jobs}
    waiting = [job for job in jobs if isinstance(job, RunJob) and not job.folder.exists()]
    if not waiting:
        return
    for file in sorted(output_dir.glob("*/record.json")):
        if file.parent.name in names:
            continue
        try:
            record = read_record(file, Record)
        except ValueError:  # the record of a cost analysis, or a damaged record
            continue
        if record is None or record.train_info.status != SUCCESS:
            continue
        job = next((job for job in waiting if job.has_record(record)), None)
        if job is None:
            continue
        earlier = replace(job, folder=file.parent)
        file.parent.rename(job.folder)
        if earlier.log.exists():
            earlier.log.rename(job.log)
        if _read_copy(results, earlier, Record) == shareable(record):
            (results / f"{earlier.result_name}.json").unlink()
        waiting.remove(job)


def _sources_first(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs in a new order, in which one job for each source model comes before all other jobs.

    The source model is the network before adaptation. Jobs that have no source model also come before the others.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.source or job.name, []).append(job)
    return [group[0] for group in groups.values()] + [job for group in groups.values() for job in group[1:]]


def _copy_record(job: Job, results: Path) -> None:
    """Copy the record of `job` to `results`, and shorten local paths in the copy to their last component.

    Do nothing if there is no record, or if `results` already contains an equal copy.
    """
    record = job.record
    if record is None:
        return
    copy = shareable(record) if isinstance(record, Record) else record
    if _read_copy(results, job, type(copy)) != copy:
        add_record(results, job.result_name, copy)


def _read_copy(results: Path, job: Job, kind: type[C]) -> C | None:
    """Read the copy of the record of `job` in `results`. Return None if the copy is missing or damaged.

    Raises:
        ValueError: If a newer version of this package has written the copy.
    """
    try:
        return read_record(results / f"{job.result_name}.json", kind)
    except ValueError as error:
        if isinstance(error.__cause__, UnknownFieldError):
            raise
        return None  # a damaged copy is replaced


def _run_in_pool(jobs: Sequence[Job], processes: int) -> Generator[tuple[Job, str | None]]:
    """Run the jobs in worker processes, and yield (job, cause) for each job that ends.

    `cause` is an error message if the worker process died. Otherwise `cause` is None, even if the job failed. A worker
    runs many jobs in turn, so that its slow imports run once. The pool replaces a dead worker.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads and locks
    pool = ProcessPool(min(processes, len(jobs)), initializer=_begin_worker, context=context)
    try:
        futures: dict[Future[None], Job] = {pool.schedule(job.attempt): job for job in jobs}
        for future in as_completed(futures):
            cause = None
            try:
                future.result()
            except ProcessExpired as error:
                cause = f"its process ended with exit code {error.exitcode}"
                if error.exitcode < 0:
                    name = signal.Signals(-error.exitcode).name
                    cause = f"its process was killed ({name}), perhaps for lack of memory: run fewer at a time (--jobs)"
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process ended before it had begun a job. Run the same command again; if that does not "
                    "help, run fewer jobs at a time (--jobs)"
                ) from error
            yield futures[future], cause
    finally:
        pool.stop()
        # Kill the workers. `pool.join` would send SIGTERM, and wait until their runs have written checkpoints.
        for process in multiprocessing.active_children():
            if process.name == "pebble_pool_worker":
                process.kill()
        pool.join()


def _begin_worker() -> None:
    """Make this worker process end together with the study's process, and set the lock of progress bars.

    If a worker did not end when the study's process was killed, it would continue its job and disturb the next study.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # The default lock of progress bars contains a semaphore. After a worker is killed, Python would warn of a leaked
    # semaphore.
    std.tqdm.set_lock(threading.RLock())


# Each dict maps the column titles of a table to the number formats of the columns.
_RUN_COLUMNS = {
    "accuracy": ".3f",
    "no update": ".3f",
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
    """Return a text table of training runs and a text table of cost analyses. A table without rows is left out.

    Each row summarises all jobs with the same `setting`. A cell contains the mean over the successful jobs ± its
    standard error, or only the mean if all values are equal. The standard error is the sample standard deviation
    divided by the square root of the number of values. The column `runs` or `analyses` contains the number of
    successful jobs, and the statuses of the jobs that did not succeed. The column `no update` has the accuracy of the
    source model (the network before adaptation) on the target (the new images). `training seconds` is the time of the
    whole training (`TrainInfo.seconds`). `tensors MiB` is the peak memory of the tensors in a step, and `process MiB`
    is the peak memory of the process.
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
        *(last[name] for name in (TARGET, TARGET_BEFORE, SOURCE, "retention")),
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
