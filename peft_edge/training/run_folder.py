"""The folder of a run: whose it is, and what it holds when the run is over.

Checkpoints from which a run goes on as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout

from peft_edge import records
from peft_edge.config import ConfigError, RunConfig, flatten, to_yaml
from peft_edge.files import atomic_write, remove, unfinished_path
from peft_edge.records import SUCCESS, Record

_RESULTS = ("checkpoints", "candidates", "adapter", "model")


@dataclass(frozen=True)
class RunFolder:
    """`output_dir`, which belongs to the one run whose configuration it holds. Only the main process writes to it."""

    path: Path
    """The folder."""

    accelerator: Accelerator
    """The run's."""

    is_resumed: bool
    """Whether the run was started before."""

    @property
    def record(self) -> Record | None:
        """The record of the run, if it has succeeded."""
        record = read_record(self.path)
        return record if record is not None and record.train_info.status == SUCCESS else None

    def write_record(self, record: Record) -> None:
        """Writes `record.json`; with that of a success, what only an unfinished run needs goes away."""
        if self.accelerator.is_main_process:
            with atomic_write(self.path / "record.json") as unfinished:
                unfinished.write_text(record.to_json(), encoding="utf-8")
            if record.train_info.status == SUCCESS:
                for name in ("candidates", "checkpoints", "profile"):
                    remove(self.path / name)

    def publish(self, update: Path) -> Path:
        """Copies the chosen adapter or model to where users look for it, and returns that folder."""
        published = self.path / update.name
        if self.accelerator.is_main_process:
            with atomic_write(published) as unfinished:
                shutil.copytree(update, unfinished)
        self.accelerator.wait_for_everyone()
        return published


def read_record(folder: Path) -> Record | None:
    """Returns the record in the folder of a run, whatever its outcome; None if there is none.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    return records.read_record(folder / "record.json", Record)


def cache_folder(config: RunConfig) -> Path:
    """What runs share: source models, and stored features."""
    # Adapters name their source model, and are loaded from other folders, too.
    return Path(config.cache_dir or Path(config.output_dir).absolute().parent / "cache").absolute()


@contextmanager
def lock_output_dir(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of `output_dir` for as long as this one lives, by a lock of the system's beside it.

    Raises:
        ConfigError: Another run is working there.
        OSError: The lock cannot be made.
    """
    if not accelerator.is_main_process:
        yield
        return
    path = Path(config.output_dir).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"output_dir: another run is working in {config.output_dir}: wait until it has ended, or choose another "
            "folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_run(config: RunConfig, accelerator: Accelerator) -> RunFolder:
    """Makes `output_dir` the folder of this run, or goes on with the one that this run has begun there.

    Raises:
        ConfigError: The folder holds another run, or files of something else.
        OSError: It cannot be written.
    """
    path = Path(config.output_dir)
    is_resumed = accelerator.is_main_process and _is_begun(config, path)
    if accelerator.is_main_process and not is_resumed:
        with atomic_write(path / "config.yaml") as unfinished:
            unfinished.write_text(to_yaml(config), encoding="utf-8")
    accelerator.wait_for_everyone()
    return RunFolder(path, accelerator, is_resumed)


def _is_begun(config: RunConfig, path: Path) -> bool:
    file = path / "config.yaml"
    # A run that was killed in its first moment leaves only the unfinished file.
    if not path.exists() or not {entry.name for entry in path.iterdir()} - {unfinished_path(file).name}:
        return False
    try:
        begun = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"output_dir: {path} is not empty and holds no run: choose another folder") from error
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"output_dir: {file} is damaged: choose another folder, or delete it ({error})") from error
    differences = _differences(begun, flatten(yaml.safe_load(to_yaml(config))))
    if differences and not any((path / name).exists() for name in _RESULTS):
        # A run that failed before it had anything to keep, as one with a mistake in its configuration does.
        return False
    if differences:
        raise ConfigError(
            "\n  ".join([f"output_dir: {path} holds another run. Choose another folder, or delete it:", *differences])
        )
    return True


def _differences(begun: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One line for each key in which two runs differ; where their results lie makes no other run of them."""
    keys = sorted(key for key in begun.keys() | asked.keys() if key != "output_dir" and not key.startswith("hub."))
    return [
        f"{key} is {begun.get(key)!r} there and {asked.get(key)!r} here"
        for key in keys
        if begun.get(key) != asked.get(key)
    ]


_PROGRESS = "progress.json"
"""Holds the :class:`Progress`."""

_DIGESTS = "sha256.json"
"""Holds the digest of every other file."""


@dataclass
class Progress:
    """How far a training has come."""

    num_processes: int
    """Processes of the run."""

    step: int = 0
    """Optimizer steps done."""

    train_time: float = 0.0
    """Seconds spent in them."""

    loss_sum: float = 0.0
    """Sum of the losses of the current epoch."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    """What each finished epoch gave."""


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int) -> None:
    """Writes `folder/step_<n>` whole, then deletes all but the newest `keep` checkpoints. All processes call it.

    Raises:
        OSError: The checkpoint cannot be written; the ones before it stay.
    """
    path = folder / f"step_{progress.step:08d}"
    is_writer = accelerator.is_main_process
    with atomic_write(path) if is_writer else nullcontext(unfinished_path(path)) as unfinished:
        # The main process has cleared the place before others write to it, and names it when all are done.
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
    """Puts the newest checkpoint into everything that the accelerator has prepared; without one, nothing changes.

    Raises:
        ValueError: The checkpoint is damaged, or of a run with another number of processes.
    """
    found = _checkpoints(folder)
    if not found:
        return Progress(accelerator.num_processes)
    if not _is_whole(found[-1]):
        raise ValueError(
            f"the checkpoint {found[-1]} is damaged: its files are not those that were written. Delete it, and the "
            "same command goes on from the one before, or from the start if there is none"
        )
    progress = Progress(**json.loads((found[-1] / _PROGRESS).read_text(encoding="utf-8")))
    if progress.num_processes != accelerator.num_processes:
        raise ValueError(
            f"{found[-1]} is the checkpoint of a run with --num_processes {progress.num_processes}, and this one has "
            f"{accelerator.num_processes}: start it with the same number, or choose another output_dir"
        )
    accelerator.load_state(str(found[-1]))
    return progress


def last_good_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> Path | None:
    """Returns the newest checkpoint from before `step`, and removes the later ones. All processes call it.

    Args:
        accelerator: The run's.
        folder: Of the checkpoints.
        step: The first one after which the weights were not good; a checkpoint is only known to be good when the step
            after it has gone well.
    """
    good = [path for path in _checkpoints(folder) if _step_of(path) < step]
    if accelerator.is_main_process:
        for path in _checkpoints(folder):
            if path not in good:
                remove(path)
    accelerator.wait_for_everyone()
    return good[-1] if good else None


def _is_whole(checkpoint: Path) -> bool:
    # Accelerate passes over random states that it cannot read, and weights with a flipped bit are weights.
    try:
        written = json.loads((checkpoint / _DIGESTS).read_text(encoding="utf-8"))
        return all(_digest(checkpoint / name) == digest for name, digest in written.items())
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
