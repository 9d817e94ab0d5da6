"""Start child processes quickly: a server process has imported all packages, and each child is a fork of the server."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

# The server only imports packages, so its forks inherit no threads and no locks.
FORK_OF_SERVER = multiprocessing.get_context("forkserver")
FORK_OF_SERVER.set_forkserver_preload(["train", "peft_edge.training.pipeline", "peft_edge.study"])


def start_process(target: Callable[..., object], *arguments: object, log: Path) -> BaseProcess:
    """Call `target` in a new process, and append its output to the file `log`."""
    process = FORK_OF_SERVER.Process(target=_call, args=(target, arguments, log))
    process.start()
    return process


def run_program(program: str, folder: Path) -> str:
    """Run Python code in a new process whose working directory is `folder`, and return what the code printed.

    Fail if the process does not end with exit code 0.
    """
    process = start_process(_run_in, folder, program, log=folder / "printed.txt")
    process.join(200)
    printed = (folder / "printed.txt").read_text()
    assert process.exitcode == 0, printed
    return printed


def _run_in(folder: Path, program: str) -> None:
    os.chdir(folder)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def _call(target: Callable[..., object], arguments: tuple[object, ...], log: Path) -> None:
    gc.freeze()  # otherwise each child would run a garbage collection over the objects of all imports
    with log.open("a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    target(*arguments)
