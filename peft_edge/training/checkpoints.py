"""Checkpoints from which a run goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from peft_edge.files import remove, unfinished_path, written_whole

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
    with written_whole(path) if is_writer else nullcontext(unfinished_path(path)) as unfinished:
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
