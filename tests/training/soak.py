"""Kills short runs of train.py at random moments, starts them again, and compares what they leave.

Run by test_soak.py, in a process of its own: it forks, which a process that has computed gradients may not. Prints one
line of JSON for each run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from peft_edge.data import digits

OPTIONS = [
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
]


def begin(folder: Path) -> int:
    """Starts a run in a process of its own, and returns its number."""
    if process := os.fork():
        return process
    try:
        with (
            (folder / "log").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            train.main([*OPTIONS, f"output_dir={folder / 'run'}"])
    except BaseException:
        (folder / "error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def digest(folder: Path) -> str:
    """Of the adapter's weights."""
    return hashlib.sha256((folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits.SPLIT_SIZES = {"adaptation": 100, "validation": 30, "test": 60}
    moments = random.Random(0)

    whole = options.folder / "whole"
    whole.mkdir(parents=True)
    started = time.monotonic()
    process = begin(whole)
    assert os.waitpid(process, 0)[1] == 0, (whole / "error").read_text()
    seconds, expected = time.monotonic() - started, digest(whole)

    for number in range(options.kills):
        folder = options.folder / f"run_{number}"
        folder.mkdir()
        moment = moments.uniform(0, seconds)
        process = begin(folder)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        checkpoints = sorted(path.name for path in folder.glob("run/checkpoints/*/step_*"))
        started = time.monotonic()
        process = begin(folder)
        is_finished = os.waitpid(process, 0)[1] == 0
        found = {
            "moment_s": round(moment, 2),
            "was_killed": was_killed,
            "checkpoint": checkpoints[-1] if checkpoints else None,
            "resumed_s": round(time.monotonic() - started, 2),
            "is_identical": is_finished and digest(folder) == expected,
        }
        print(json.dumps(found), flush=True)
        if found["is_identical"]:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
