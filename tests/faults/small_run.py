"""Start short runs of train.py in their own processes. This module is also a program that is called like train.py."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import train
from peft_edge.data import embedded
from tests.processes import start_process

OPTIONS = (
    "backbone.name=mobilenetv3_small_050",
    "data.name=digits",
    "data.shift=blend",
    "data.image_size=32",
    "source.epochs=1",
    "training.epochs=3",
    "training.warmup_steps=1",
    "training.learning_rate=[3e-3,1e-2]",
    "training.checkpoint_every_steps=2",
    "adapter.lora_dropout=0.1",
    "trackers=[]",
    "profiling.every_n_steps=0",
    "--cpu",
)

FIRST_TRAINING = "lr_0.003"

_BEGIN = "--- a process begins"


def arguments(folder: Path, *options: str) -> list[str]:
    return [*OPTIONS, *options, f"output_dir={folder}"]


def begin(folder: Path, *options: str, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """Start or resume a run in `folder`, and append its output to `log_of(folder)`.

    Args:
        folder: The output_dir of the run.
        options: Arguments in addition to `OPTIONS`.
        prepare: Called first in the new process, to cause a fault.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    return start_process(_run, arguments(folder, *options), prepare, log=log_of(folder))


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def ended(process: BaseProcess) -> tuple[int | None, float]:
    """Wait for `process` to end. Return its exit code, and the number of seconds until it ended."""
    started = time.monotonic()
    process.join(180)
    if process.is_alive():
        process.kill()
        raise AssertionError("the process did not end")
    return process.exitcode, time.monotonic() - started


def completed(folder: Path, *options: str) -> float:
    """Run train.py in `folder` until it ends, and return the number of seconds. Fail if the exit code is not 0.

    Also check that each training run continues from its newest checkpoint, if there is one.
    """
    saved = {path.name: steps_saved(folder, path.name) for path in (folder / "checkpoints").glob("*")}
    process = begin(folder, *options)
    code, seconds = ended(process)
    log = log_of(folder).read_text()
    assert code == 0, log
    for training, first_step in re.findall(
        r"adapting, (\S+):[^|]*\|[^|]*\| (\d+)/\d+ \[00:00<\?", log.split(_BEGIN)[-1]
    ):
        assert int(first_step) == max(saved.get(training, []), default=0)
    return seconds


def wait_for(step: int, folder: Path, process: BaseProcess, training: str = FIRST_TRAINING) -> None:
    """Wait until the checkpoint of the given step exists. Fail if the process ends before."""
    checkpoint = folder / "checkpoints" / training / f"step_{step:08d}"
    while not checkpoint.exists():
        assert process.is_alive(), log_of(folder).read_text()
        time.sleep(0.002)


def steps_saved(folder: Path, training: str = FIRST_TRAINING) -> list[int]:
    found = (folder / "checkpoints" / training).glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def digest(folder: Path) -> str:
    """Return a hash of the adapter's weights."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _run(options: list[str], prepare: Callable[[], object] | None) -> None:
    print(_BEGIN, flush=True)
    if prepare is not None:
        prepare()
    main(options)


def main(options: list[str]) -> None:
    """Run `train.py` with fewer images of digits than usual."""
    torch.set_num_threads(1)
    embedded.DIGITS_SPLIT_SIZES = {"adaptation": 100, "validation": 30, "test": 60}
    sys.argv = ["train.py", *options]
    train.command()


if __name__ == "__main__":
    main(sys.argv[1:])
