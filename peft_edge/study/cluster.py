"""Run the jobs of a study as tasks on a Ray cluster, whose nodes need not share a file system with this machine.

A job runs in a temporary folder of its node. Its log and its files return to this machine as the result of the task. A
separate task trains each source model (the network before adaptation). Ray passes the trained model to the tasks of all
runs that adapt this model.
"""

from __future__ import annotations

import getpass
import hashlib
import io
import logging
import os
import platform
import socket
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm.auto import tqdm

from peft_edge._compat import ray_address
from peft_edge.files import atomic_write, remove, requires_extra
from peft_edge.records import add_record, package_info
from peft_edge.study.jobs import Job

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

# The number of times that Ray repeats a task whose node or worker process has died, for example for lack of memory.
_MAX_RETRIES = 3
# Seconds between two updates of the number of nodes in the progress bar.
_REFRESH_S = 5.0
_SOURCES = Path("cache") / "sources"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and the resources that each run needs.

    Every node needs an installation of peft-edge. Data and weights that a configuration names by a path must be at this
    path on every node. If a node or a worker process dies, Ray repeats the run up to three times. The repeated run
    continues from its last checkpoint if its temporary folder still exists, for example in a `TMPDIR` that the nodes
    share. If the folder is missing, the run starts from the beginning.

    Attributes:
        address: `auto` for the cluster that this machine belongs to, `HOST:PORT` if this machine belongs to several
            clusters, or `local` to start Ray on this machine alone.
        num_cpus: CPU cores for each run. None means `num_threads` of the run.
        num_gpus: GPUs for each run. With 0.5, two runs share a GPU.
        memory: Bytes of memory that Ray reserves for each run. A run waits until a node has this much memory that is
            not reserved for other runs. If `memory` is None, Ray reserves none.
        artifacts: An address for fsspec, such as `s3://bucket/runs`. The nodes upload the subfolders of each finished
            run (the saved adapter or model, and the training curves) to this address. If it is None, the nodes send
            these folders back to the output folder.
    """

    address: str = "auto"
    num_cpus: float | None = None
    num_gpus: float = 0.0
    memory: int | None = None
    artifacts: str | None = None

    def run(self, jobs: Sequence[Job], bar: tqdm) -> Generator[tuple[Job, str | None]]:
        """Run the jobs, and yield (job, cause) for each job that ends.

        `cause` is an error message if the job's Ray task failed (for example, because its node died), or if
        `job.check_folder` rejects the job's folder. Otherwise `cause` is None. If the job itself failed, `cause` is
        also None, and the job's log contains the reason. The progress bar `bar` shows the number of nodes.

        Raises:
            ImportError: If Ray or the package for the protocol of `artifacts` is not installed.
            ValueError: If `address` is not `auto`, `local` or `HOST:PORT`, or if `artifacts` has an unknown protocol.
            OSError: If the cluster cannot be reached, or if `artifacts` or a file cannot be written.
        """
        # If Ray's memory monitor kills a task, Ray repeats the task. This variable limits the number of repetitions. It
        # must be set before Ray is imported.
        os.environ.setdefault("RAY_task_oom_retries", str(_MAX_RETRIES))
        with requires_extra("cluster"):
            import ray

            if self.artifacts is not None:
                _check_artifacts(self.artifacts)
        if not jobs:
            return
        is_ours = not ray.is_initialized()
        if is_ours:
            _check_address(self.address)
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.WARNING)
            except RuntimeError as error:  # for example if the versions of Ray differ
                raise ConnectionError(
                    f"cannot use the Ray cluster at {self.address}: {error}\nThis machine must belong to the cluster: "
                    "`ray start --address=HOST:PORT --num-cpus=0` adds it without running jobs here"
                ) from error
        self._warn_if_no_node_fits(jobs)
        tasks: dict[ObjectRef, Job] = {}
        sources: dict[str | None, ObjectRef] = {}
        try:
            for job in jobs:
                try:
                    job.check_folder()
                except ValueError as error:
                    yield job, str(error)
                    continue
                if job.source is not None and job.source not in sources:
                    sources[job.source] = self._source(job)
                run = ray.remote(_run_on_node).options(**self._options(job))
                tasks[run.remote(job, _study_id(job), sources.get(job.source), self.artifacts)] = job
            refreshed = -_REFRESH_S
            while tasks:
                if time.monotonic() - refreshed >= _REFRESH_S:
                    refreshed = time.monotonic()
                    bar.set_description(f"study, nodes: {sum(node['Alive'] for node in ray.nodes())}")
                for ref in ray.wait(list(tasks), timeout=_REFRESH_S, fetch_local=False)[0]:
                    job, cause = tasks.pop(ref), None
                    try:
                        place, log, files = ray.get(ref)
                        job.append_to_log(log)
                        _unpack(files, job.folder.parent, place=place)
                        if job.is_finished:
                            remove(job.failed_folder)
                        if (source := sources.pop(job.source, None)) is not None:
                            _keep_source(job, ray.get(source))
                    except ray.exceptions.RayError as error:
                        cause = f"its task failed on the cluster: {error}"
                    yield job, cause
        finally:
            if is_ours:
                ray.shutdown()  # ends the tasks
            else:
                for ref in tasks:
                    ray.cancel(ref, force=True)

    def _warn_if_no_node_fits(self, jobs: Sequence[Job]) -> None:
        """Warn about jobs that no present node can run. These jobs wait, because a larger node may join later."""
        import ray

        def in_words(resources: tuple[float, ...]) -> str:
            return "{:g} CPU, {:g} GPU and {:.1f} GiB".format(*resources)

        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(node.get("CPU", 0), node.get("GPU", 0), node.get("memory", 0) / 2**30) for node in found]
        for num_cpus in {self._options(job)["num_cpus"] for job in jobs}:
            needs = (num_cpus, self.num_gpus, (self.memory or 0) / 2**30)
            if not any(all(have >= need for have, need in zip(node, needs, strict=True)) for node in nodes):
                logger.warning(
                    "a run needs %s. It waits until such a node joins, because the nodes have %s",
                    in_words(needs),
                    "; ".join(map(in_words, nodes)),
                )

    def _options(self, job: Job) -> dict[str, Any]:
        num_cpus = job.num_threads if self.num_cpus is None else self.num_cpus
        needs = {"num_cpus": num_cpus, "num_gpus": self.num_gpus, "memory": self.memory}
        return {**needs, "max_retries": _MAX_RETRIES}

    def _source(self, job: Job) -> ObjectRef:
        """Return a Ray reference to a tar file with the source model of `job` (the network before adaptation).

        If the output folder does not contain this model, start a task that trains the model and returns the file.
        """
        import ray

        name = _source_name(job)
        folder = name.with_name(name.read_text(encoding="utf-8")) if name.exists() else None
        if folder is not None and folder.is_dir():
            return ray.put(_pack([folder]))
        return ray.remote(_train_source).options(**self._options(job)).remote(job, _study_id(job))


def _check_address(address: str) -> None:
    """Raise an error if nothing listens at `address`. Without this check, Ray would try to connect for many minutes."""
    found = None
    try:
        found = ray_address(address)
        if found is not None:
            host, _, port = found.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
    except ValueError as error:
        raise ValueError(
            f"cluster: expected auto, local or HOST:PORT such as 10.0.0.1:6379, found {address!r}"
        ) from error
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {found or address} ({error}): "
            "start one with `ray start --head --port=6379`, or give the address that it printed"
        ) from error


def _check_artifacts(artifacts: str) -> None:
    """Write a file to the address `artifacts`, so that a wrong address stops the study before any job runs."""
    import fsspec

    system, path = fsspec.url_to_fs(artifacts)
    with tempfile.TemporaryDirectory() as folder:
        note = "The records of these runs are in the output folder of the study.\n"
        Path(folder, "peft-edge-study.txt").write_text(note, encoding="utf-8")
        try:
            system.put(f"{folder}/", f"{path}/", recursive=True)
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"cannot write to {artifacts}: {error!r}") from error


def _study_id(job: Job) -> str:
    """Return the name of the folder that all jobs of this study use inside the temporary folder of a node."""
    owner = (getpass.getuser(), platform.node(), str(job.folder.parent.absolute()))
    return f"peft-edge-{hashlib.sha256(repr(owner).encode()).hexdigest()[:16]}"


def _source_name(job: Job) -> Path:
    """Return the path of a text file for the job's source model (the network before adaptation).

    The file contains the name of the folder that holds the model. `_keep_source` writes the file after a task has
    trained the model, in this study or in an earlier one.
    """
    key = hashlib.sha256(repr((job.source, package_info())).encode()).hexdigest()[:16]
    return job.folder.parent / _SOURCES / f"{key}.txt"


def _keep_source(job: Job, packed: bytes) -> None:
    """Unpack the source model of `job` (the network before adaptation) into the study's output folder.

    `packed` is a tar file with the folder of the model. Saved adapters refer to the unpacked folder. The name of this
    folder is written to the file `_source_name(job)`, so that the next study finds the model.
    """
    for folder in _unpack(packed, job.folder.parent / _SOURCES, keep=True):
        with atomic_write(_source_name(job)) as unfinished:
            unfinished.write_text(folder.name, encoding="utf-8")


def _train_source(job: Job, study: str) -> bytes:
    """Train the source model of `job` (the network before adaptation) on a node.

    Return the model as a tar file, and delete the files on the node.
    """
    moved = job.moved_to(Path(tempfile.gettempdir(), study, "source", _source_name(job).stem))
    moved.train_source()
    folder = moved.folder.parent / _SOURCES
    packed = _pack([path for path in folder.glob("*") if path.is_dir()])
    remove(moved.folder.parent)
    return packed


def _run_on_node(job: Job, study: str, source: bytes | None, artifacts: str | None) -> tuple[Path, str, bytes]:
    """Run `job` on a node. Return the study's folder on the node, the log as text, and the job's files as a tar file.

    `source` is a tar file with the source model (the network before adaptation). If `artifacts` is not None, the
    subfolders of a finished job are uploaded to this address, and are not in the returned tar file. If the job did not
    finish, the tar file contains only the record of the job. The other files of the job stay on the node, and a new
    attempt on this node continues from the last checkpoint.
    """
    root = Path(tempfile.gettempdir(), study)
    moved = job.moved_to(root)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if source is not None:
        _unpack(source, root / _SOURCES, keep=True)
    remove(moved.log)
    moved.attempt()
    packed = [moved.folder]
    if moved.is_finished and artifacts is not None:
        _upload(moved.folder, artifacts)
    elif not moved.is_finished:
        packed = [moved.failed_folder]
        if (record := moved.record) is not None:
            add_record(moved.failed_folder, "record", record)
    files = _pack([folder for folder in packed if folder.exists()])
    log = moved.log.read_text(encoding="utf-8", errors="replace")
    remove(moved.log)
    if moved.is_finished:
        remove(moved.folder)
    return root, log, files


def _upload(folder: Path, artifacts: str) -> None:
    """Move each subfolder of `folder` to the address `artifacts/<name of folder>/<name of subfolder>`."""
    import fsspec

    system, path = fsspec.url_to_fs(artifacts)
    for subfolder in (entry for entry in folder.iterdir() if entry.is_dir()):
        # Because of the final slashes, fsspec copies the contents of the subfolder. Without them, fsspec would create
        # the subfolder inside the target if an earlier attempt has left a target.
        system.put(f"{subfolder}/", f"{path}/{folder.name}/{subfolder.name}/", recursive=True)
        remove(subfolder)


def _pack(folders: Sequence[Path]) -> bytes:
    """Return the bytes of a tar file with `folders`. The file is not compressed, because weights hardly compress."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in folders:
            archive.add(folder, arcname=folder.name)
    return buffer.getvalue()


def _unpack(packed: bytes, target: Path, *, place: Path | None = None, keep: bool = False) -> list[Path]:
    """Unpack the folders in the tar file `packed` into `target`, and return their paths.

    With `keep`, a folder that already exists in `target` is not replaced. `place` is the folder that contained the
    folders on another machine. If `place` is given, paths in JSON and YAML files are adapted to this machine: paths
    inside `place` become paths inside `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with (
        FileLock(target / ".unpack.lock"),  # tasks on one node may unpack the same source model at once
        tempfile.TemporaryDirectory(dir=target, prefix=".unpack-") as temporary,
        tarfile.open(fileobj=io.BytesIO(packed)) as archive,
    ):
        archive.extractall(temporary, filter="data")
        for folder in Path(temporary).iterdir():
            if place is not None:
                _replace_paths(folder, place, target)
            written.append(target / folder.name)
            if not (keep and written[-1].exists()):
                with atomic_write(written[-1]) as unfinished:
                    folder.rename(unfinished)
    return written


def _replace_paths(folder: Path, place: Path, target: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.suffix in (".json", ".yaml")):
        text = file.read_text(encoding="utf-8")
        # An adapter contains the path of its source model (the network before adaptation). This path must be absolute.
        # All other paths may be relative.
        text = text.replace(str(place / _SOURCES), str(target.absolute() / _SOURCES)).replace(str(place), str(target))
        file.write_text(text, encoding="utf-8")
