"""The folder of a run: whose it is, and what it holds when the run is over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout

from peft_edge import archive
from peft_edge.config import ConfigError, RunConfig, flatten, to_yaml
from peft_edge.files import remove, unfinished_path, written_whole
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
            with written_whole(self.path / "record.json") as unfinished:
                unfinished.write_text(record.to_json(), encoding="utf-8")
            if record.train_info.status == SUCCESS:
                for name in ("candidates", "checkpoints", "profile"):
                    remove(self.path / name)

    def publish(self, update: Path) -> Path:
        """Copies the chosen adapter or model to where users look for it, and returns that folder."""
        published = self.path / update.name
        if self.accelerator.is_main_process:
            with written_whole(published) as unfinished:
                shutil.copytree(update, unfinished)
        self.accelerator.wait_for_everyone()
        return published


def read_record(folder: Path) -> Record | None:
    """Returns the record in the folder of a run, whatever its outcome; None if there is none.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    return archive.read_record(folder / "record.json", Record)


@contextmanager
def claimed(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
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
        with written_whole(path / "config.yaml") as unfinished:
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
