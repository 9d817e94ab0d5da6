"""Run train.py in double precision, each time in new processes.

In double precision, the results of two runs with the same arithmetic differ by less than 1e-9.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import nn

import train
from peft_edge.data import embedded
from peft_edge.training import pipeline
from tests.processes import start_process


def run_in_double(arguments: list[str], output_dir: Path, num_processes: int = 1) -> None:
    """Run train.py in double precision in `num_processes` processes. Fail if an exit code is not 0.

    If there are several processes, they have the environment variables that `torchrun` sets.
    """
    processes, log = start_processes(_run, arguments, output_dir, num_processes)
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0] * num_processes, log.read_text()


def start_processes(
    target: Callable[..., None], arguments: list[str], output_dir: Path, num_processes: int
) -> tuple[list[BaseProcess], Path]:
    """Start processes that call `target` with the arguments and the environment of a run.

    Return the processes, and the path of the file with their output.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = output_dir.with_name(f"{output_dir.name}.log")
    processes: list[BaseProcess] = []
    for rank in range(num_processes):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if num_processes > 1 else {}
        options = [*arguments, f"output_dir={output_dir}"]
        processes.append(start_process(target, options, environment if num_processes > 1 else {}, log=log))
    return processes, log


def _in_double(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(item.double() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs)


def fail_on_process_0(options: list[str], environment: dict[str, object]) -> None:
    """Run train.py so that process 0 raises an error when it loads the source model.

    Afterwards, process 0 sleeps. This is how a failed process behaves under a launcher that does not end the others.
    """

    def fail(*arguments: object, **names: object) -> nn.Module:
        if environment["RANK"] == 0:
            raise OSError("the disk is lost")
        return source_model(*arguments, **names)

    source_model, pipeline.source_model = pipeline.source_model, fail
    try:
        _run(options, environment)
    except OSError:
        time.sleep(100)


def _run(options: list[str], environment: dict[str, object]) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    _train_in_double(options)


def _train_in_double(options: list[str]) -> None:
    embedded.DIGITS_SPLIT_SIZES = {"adaptation": 100, "validation": 30, "test": 60}
    torch.set_default_dtype(torch.float64)
    nn.modules.module.register_module_forward_pre_hook(_in_double)
    train.main(options)


if __name__ == "__main__":
    _train_in_double(sys.argv[1:])
