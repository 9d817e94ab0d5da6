"""Run train.py in double precision, where two equal runs differ by less than 1e-9. Each run has its own processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import nn

import train
from peft_edge.data import embedded

# Each process is forked from a server process that has imported everything and computed nothing.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])


def run_in_double(arguments: list[str], output_dir: Path, num_processes: int = 1) -> None:
    """Run train.py in `num_processes` processes, with the environment that `torchrun` sets. Expect success."""
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
        process = _PROCESSES.Process(target=_run, args=(options, log, environment if num_processes > 1 else {}))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0] * num_processes, log.read_text()


def _in_double(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(item.double() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs)


def _run(options: list[str], log: Path, environment: dict[str, object]) -> None:
    with log.open("a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ |= {name: str(value) for name, value in environment.items()}
    embedded.DIGITS_SPLIT_SIZES = {"adaptation": 100, "validation": 30, "test": 60}
    torch.set_default_dtype(torch.float64)
    nn.modules.module.register_module_forward_pre_hook(_in_double)
    train.main(options)
