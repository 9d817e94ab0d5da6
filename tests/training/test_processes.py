"""Runs on several processes at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from peft_edge.records import FAILED, StepProfile
from tests.training import double_precision
from tests.training.double_precision import fail_on_process_0, run_in_double, start_processes
from tests.training.support import adapter_of, record_of

ROOT = Path(__file__).parents[2]


def start_on_two_machines(script: str, arguments: list[str], output_dir: Path) -> list[subprocess.Popen[str]]:
    """Start one launcher for each of two machines, with the command of the guide. Both machines are this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", *machines, "--main_process_port", str(port)]
    return [
        subprocess.Popen(
            [sys.executable, *launcher, "--machine_rank", rank, script, *arguments, f"output_dir={output_dir}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def processes_of(folder: Path) -> str:
    return record_of(folder).meta_info.system_info["num_processes"]


def steps_of(profile: list[StepProfile]) -> list[StepProfile]:
    return [row for row in profile if row.scope == "step"]


@pytest.mark.distributed
def test_two_processes_and_two_machines_give_the_adapter_of_one_process(arguments: list[str], tmp_path: Path) -> None:
    """In double precision: in single precision, Adam turns rounding into steps of up to the learning rate."""
    measured = [*arguments, "profiling.every_n_steps=1000"]
    run_in_double(measured, tmp_path / "one")
    run_in_double(measured, tmp_path / "two", 2)
    for launcher in start_on_two_machines(double_precision.__file__, measured, tmp_path / "machines"):
        _, errors = launcher.communicate(timeout=500)
        assert launcher.returncode == 0, errors
    # Accelerate may run fewer processes than requested; then this would compare one process with one.
    assert [processes_of(tmp_path / name) for name in ("one", "two", "machines")] == ["1", "2", "2"]
    one = adapter_of(tmp_path / "one")
    assert {tensor.dtype for tensor in one.values()} == {torch.float64, torch.int64}
    for other in (adapter_of(tmp_path / "two"), adapter_of(tmp_path / "machines")):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-9, rtol=1e-9)
    (whole,), (first, second) = (steps_of(record_of(tmp_path / name).profile) for name in ("one", "two"))
    assert [row.process_index for row in (whole, first, second)] == [0, 0, 1]
    assert first.forward_s != second.forward_s
    # Each process has half of the images, and composes all kernels.
    assert whole.flops_forward / 2 < first.flops_forward == second.flops_forward < whole.flops_forward


@pytest.mark.distributed
def test_two_processes_store_features_once_and_train_the_same_adapter(arguments: list[str], tmp_path: Path) -> None:
    replay = ["adapter.target_modules=last-stage", "norm=recalibrate", "training.replay=true"]
    sources = next(argument for argument in arguments if argument.startswith("cache_dir="))
    for name, num_processes in (("one", 1), ("two", 2)):
        options = [argument for argument in arguments if argument != sources] + [f"cache_dir={tmp_path / name}_cache"]
        run_in_double([*options, *replay], tmp_path / name, num_processes)
        caches = [path for path in (tmp_path / f"{name}_cache" / "features").iterdir() if path.is_dir()]
        assert len(caches) == 1
    assert (processes_of(tmp_path / "one"), processes_of(tmp_path / "two")) == ("1", "2")
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        # Features are stored in single precision, so the last bits of the prefix may round differently.
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["norm-stats", "galore"])
def test_other_methods_give_the_same_update_on_two_processes(arguments: list[str], tmp_path: Path, method: str) -> None:
    options = [*arguments, f"method={method}", "data.shift=null", "data.new_classes=[8, 9]", "data.rehearsal_size=40"]
    run_in_double(options, tmp_path / "one")
    run_in_double(options, tmp_path / "two", 2)
    assert (processes_of(tmp_path / "one"), processes_of(tmp_path / "two")) == ("1", "2")
    one, two = (load_file(next((tmp_path / name).glob("*/*.safetensors"))) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-9, rtol=1e-9)


@pytest.mark.distributed
def test_a_failure_of_one_process_ends_the_others_with_its_reason(arguments: list[str], tmp_path: Path) -> None:
    (first, second), log = start_processes(fail_on_process_0, arguments, tmp_path / "run", 2)
    second.join(100)
    assert first.is_alive()
    first.kill()
    first.join()
    assert second.exitcode == 1
    assert "process 1 ends, because process 0 failed: OSError: the disk is lost" in log.read_text()
    assert "the disk is lost" in record_of(tmp_path / "run").run_info.error_msg


@pytest.mark.distributed
def test_if_a_machine_dies_the_other_ends_with_the_reason_and_one_process_cannot_resume(
    arguments: list[str], tmp_path: Path
) -> None:
    first, second = start_on_two_machines("train.py", [*arguments, "training.epochs=1000"], tmp_path / "run")
    while not list(tmp_path.glob("run/checkpoints/*/step_*")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()
    started = time.monotonic()
    second.communicate()
    _, errors = first.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert first.returncode == 1
    assert "Connection" in errors
    record = record_of(tmp_path / "run")
    assert record.train_info.status == FAILED
    assert "Connection" in record.run_info.error_msg

    checkpoints = sorted(tmp_path.glob("run/checkpoints/*/step_*"))
    command = [sys.executable, "train.py", *arguments, "training.epochs=1000", f"output_dir={tmp_path / 'run'}"]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode != 0
    assert "a run with --num_processes 2, and this one has 1" in alone.stderr
    assert sorted(tmp_path.glob("run/checkpoints/*/step_*")) == checkpoints
