"""Read and write the folder of a run: configuration, record, adapter or model, checkpoints. Locate the shared cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout

from peft_edge.config import ConfigError, RunConfig, flatten, to_yaml
from peft_edge.files import atomic_write, remove, unfinished_path
from peft_edge.records import SUCCESS, Record, read_record


@dataclass(frozen=True)
class ActiveRun:
    """A run and its folder `config.output_dir`. Only the main process writes results into this folder."""

    config: RunConfig
    accelerator: Accelerator
    is_resumed: bool  # whether an earlier command started this run; always False outside the main process

    @property
    def path(self) -> Path:
        """The folder `config.output_dir`."""
        return Path(self.config.output_dir)

    @property
    def record(self) -> Record | None:
        """The content of `record.json` if the run has succeeded, otherwise None. A damaged file raises a ValueError."""
        return _success_in(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether `record.json` says that the run has succeeded. False if this file cannot be read."""
        try:
            return self.record is not None
        except (ValueError, OSError):  # a caller that needs the reason can read `record`, which raises the error
            return False

    def write_record(self, record: Record) -> None:
        """Write `record.json` on the main process. If the record reports success, delete all intermediate results."""
        if self.accelerator.is_main_process:
            with atomic_write(self.path / "record.json") as unfinished:
                unfinished.write_text(record.to_json(), encoding="utf-8")
            if record.train_info.status == SUCCESS:
                for name in ("candidates", "checkpoints", "profile"):
                    remove(self.path / name)

    def publish(self, update: Path) -> Path:
        """Copy the folder `update`, named `adapter` or `model`, into `self.path`, and return the path of the copy."""
        published = self.path / update.name
        if self.accelerator.is_main_process:
            with atomic_write(published) as unfinished:
                shutil.copytree(update, unfinished)
        self.accelerator.wait_for_everyone()
        return published


@contextmanager
def lock_output_dir(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Lock `output_dir` during a `with` block, so that no other run can use it.

    Only the main process takes and holds the lock. If this process dies, the operating system releases the lock.

    Raises:
        ConfigError: If another run holds the lock.
        OSError: If the lock file cannot be created.
    """
    if not accelerator.is_main_process:
        yield
        return
    path = Path(config.output_dir).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output_dir: another run is working in {config.output_dir}: wait for its end, or choose another folder"
        ) from error
    with lock:
        yield


@contextmanager
def end_together(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """If a process fails in the `with` block, print the reason in all other processes, and end them with exit code 1.

    Some launchers do not end the other processes, which would then wait for the failed process forever. The failed
    process writes the reason to a file next to `output_dir`. A thread in each of the other processes looks for this
    file once a second, and ends its process five seconds after it finds the file. A process that raises an error itself
    in these five seconds, for example in a collective operation, ends with its own error instead. In this case, the
    main process can still write a record of the failure.
    """
    if accelerator.num_processes == 1:
        yield
        return
    path = Path(config.output_dir).absolute()
    file, index = path.with_name(f".{path.name}.failed"), accelerator.process_index
    if accelerator.is_main_process:
        remove(file)
    accelerator.wait_for_everyone()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            if file.exists() and not is_over.wait(5):
                # End the process from this thread, because an exception cannot interrupt a collective operation in the
                # main thread.
                print(f"process {index} ends, because {file.read_text(encoding='utf-8')}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except BaseException as error:
        is_over.set()
        with suppress(OSError):  # on a full disk, only the launcher can end the other processes
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as reason:  # only the first failed process writes its reason
                reason.write(f"process {index} failed: {type(error).__name__}: {error}")
        raise
    finally:
        is_over.set()


def find_run(config: RunConfig, accelerator: Accelerator) -> ActiveRun:
    """Return the run of `config`, without writing anything.

    Raises:
        ConfigError: If `config.output_dir` contains results of a different run, unrelated files, or a damaged
            `config.yaml`.
        ValueError: If `config.output_dir` contains a different run with a damaged `record.json`.
    """
    is_resumed = accelerator.is_main_process and is_started(config, Path(config.output_dir))
    return ActiveRun(config, accelerator, is_resumed)


def open_run(config: RunConfig, accelerator: Accelerator) -> ActiveRun:
    """Create the folder of a run, or open the folder if an earlier command started the same run there.

    If the folder contains a different run that has no checkpoints and no results, the new run replaces that run.

    Raises:
        ConfigError: If `find_run` raises a ConfigError.
        ValueError: If `find_run` raises a ValueError.
        OSError: If the folder cannot be written.
    """
    run = find_run(config, accelerator)
    if accelerator.is_main_process and not run.is_resumed:
        with atomic_write(run.path / "config.yaml") as unfinished:
            unfinished.write_text(to_yaml(config), encoding="utf-8")
    accelerator.wait_for_everyone()
    return run


def is_started(config: RunConfig, path: Path) -> bool:
    """Return whether `path` holds the run of `config`, finished or not.

    If `path` does not exist, is empty, or holds a different run that has no checkpoints and no results, return False.

    Raises:
        ConfigError: If `path` contains results of a different run, unrelated files, or a damaged `config.yaml`.
        ValueError: If `path` contains a different run with a damaged `record.json`.
    """
    file = path / "config.yaml"
    # A process that is killed while it writes `config.yaml` leaves only the temporary file of `atomic_write`.
    if not path.exists() or not {entry.name for entry in path.iterdir()} - {unfinished_path(file).name}:
        return False
    try:
        found = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"output_dir: {path} is not empty and holds no run: choose another folder") from error
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"output_dir: {file} is damaged: choose another folder, or delete it ({error})") from error
    given = flatten(yaml.safe_load(to_yaml(config)))
    # `output_dir` and the keys of section `hub` may differ between two starts of the same run.
    keys = sorted(key for key in found.keys() | given.keys() if key != "output_dir" and not key.startswith("hub."))
    differences = [
        f"{key} is {found.get(key)!r} there and {given.get(key)!r} here"
        for key in keys
        if found.get(key) != given.get(key)
    ]
    if not differences:
        return True
    # A run with `method="none"` has none of these folders, only a record.
    names = ("checkpoints", "candidates", "adapter", "model")
    if _success_in(path) is not None or any((path / name).exists() for name in names):
        raise ConfigError(
            "\n  ".join([f"output_dir: {path} holds another run. Choose another folder, or delete it:", *differences])
        )
    # `path` holds a different run, which failed before it had results, for example because its configuration was wrong.
    return False


def _success_in(folder: Path) -> Record | None:
    record = read_record(folder / "record.json", Record)
    return record if record is not None and record.train_info.status == SUCCESS else None


def cache_folder(config: RunConfig) -> Path:
    """Return the absolute path of the folder in which runs share source models, stored features and predictions."""
    # The path is absolute, because a saved adapter contains the path of its source model, and may be loaded from
    # another working directory.
    return Path(config.cache_dir or Path(config.output_dir).absolute().parent / "cache").absolute()


def cache_key(config: RunConfig, device_type: str, **parts: object) -> str:
    """Return the cache key of a result: a SHA-256 hash of everything that the result depends on.

    The key depends on `parts`, `device_type`, `config.seed`, `config.num_threads`, and the versions of torch,
    torchvision and timm.
    """
    parts |= {
        "seed": config.seed,
        "device": device_type,
        "num_threads": config.num_threads,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_PROGRESS, _DIGESTS = "progress.json", "sha256.json"


@dataclass
class Progress:
    """The state of the training loop in a checkpoint."""

    num_processes: int
    step: int = 0  # number of finished optimizer steps
    train_time: float = 0.0  # seconds in the finished steps, or in estimating BatchNorm statistics if there are none
    loading_time: float = 0.0  # seconds in which the finished steps waited for their batches
    validation_time: float = 0.0  # seconds of the validation after finished epochs
    loss_sum: float = 0.0  # sum of the losses of the finished steps in the current epoch
    metrics: list[dict[str, int | float | None]] = field(default_factory=list)  # measurements of each finished epoch


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int) -> None:
    """Write a checkpoint to `folder/step_<progress.step>` atomically, then delete old checkpoints.

    The newest `keep` checkpoints are kept. All processes must call this function.

    Raises:
        OSError: If the checkpoint cannot be written. Earlier checkpoints are kept.
    """
    path = folder / f"step_{progress.step:08d}"
    is_writer = accelerator.is_main_process
    with atomic_write(path) if is_writer else nullcontext(unfinished_path(path)) as unfinished:
        # In the main process, `atomic_write` deletes an old folder `unfinished` before the other processes write there,
        # and renames the folder after the block.
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if is_writer:
            (unfinished / _PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            files = [file for file in sorted(unfinished.rglob("*")) if file.is_file()]
            digests = {str(file.relative_to(unfinished)): _digest(file) for file in files}
            (unfinished / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    if is_writer:
        for old in _checkpoints(folder)[:-keep]:
            remove(old)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> Progress:
    """Load the newest checkpoint in `folder` into the objects that `accelerator` prepared, and return the `Progress`.

    If there is no checkpoint, load nothing and return the `Progress` of step 0.

    Raises:
        ValueError: If the newest checkpoint is damaged, or was written by a different number of processes.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return Progress(accelerator.num_processes)
    newest = checkpoints[-1]
    if not _is_intact(newest):
        raise ValueError(
            f"the checkpoint {newest} is damaged: its files have changed since they were written. Delete it, and the "
            "same command continues from the previous checkpoint, or from the start"
        )
    progress = Progress(**json.loads((newest / _PROGRESS).read_text(encoding="utf-8")))
    if progress.num_processes != accelerator.num_processes:
        raise ValueError(
            f"{newest} is the checkpoint of a run with --num_processes {progress.num_processes}, and this one has "
            f"{accelerator.num_processes}: use the same number of processes, or choose another output_dir"
        )
    accelerator.load_state(str(newest))
    return progress


def last_good_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> Path | None:
    """Delete the checkpoints of `step` and later steps. Return the newest remaining checkpoint, or None.

    `step` is the first step after which the weights may have diverged. If the loss of step n is too high or
    not finite, pass n - 1, because this loss was computed with the weights after step n - 1. All processes must call
    this function.
    """
    good = [path for path in _checkpoints(folder) if int(path.name.removeprefix("step_")) < step]
    if accelerator.is_main_process:
        for path in _checkpoints(folder)[len(good) :]:
            remove(path)
    accelerator.wait_for_everyone()
    return good[-1] if good else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())


def _is_intact(checkpoint: Path) -> bool:
    # Compare hashes, because `accelerator.load_state` silently skips random states that it cannot read, and does not
    # detect flipped bits in the weights.
    try:
        written = json.loads((checkpoint / _DIGESTS).read_text(encoding="utf-8"))
        return all(_digest(checkpoint / name) == digest for name, digest in written.items())
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):  # errors of a missing or damaged file
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
