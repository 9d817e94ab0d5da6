"""Runs on several processes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_edge.records import StepProfile
from tests.training.support import adapter_of, record_of

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = (
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv_backend=c10d",
    "--rdzv_endpoint=localhost:0",
)
IN_DOUBLE = str(Path(__file__).with_name("double_precision.py"))


def start(arguments: list[str], output_dir: Path, *launcher: str, script: str = "train.py") -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, script, *arguments, f"output_dir={output_dir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors


def processes_of(folder: Path) -> str:
    return record_of(folder).meta_info.system_info["num_processes"]


def steps_of(profile: list[StepProfile]) -> list[StepProfile]:
    return [row for row in profile if row.scope == "step"]


@pytest.mark.distributed
def test_two_processes_give_the_adapter_of_one(arguments: list[str], tmp_path: Path) -> None:
    """In double precision: in single precision, Adam turns rounding into steps of up to the learning rate."""
    measured = [*arguments, "profiling.every_n_steps=1000"]
    finish(start(measured, tmp_path / "one", script=IN_DOUBLE))
    finish(start(measured, tmp_path / "two", *TWO_PROCESSES, script=IN_DOUBLE))
    # Accelerate may run fewer processes than requested; then this would compare one process with one.
    assert (processes_of(tmp_path / "one"), processes_of(tmp_path / "two")) == ("1", "2")
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert {tensor.dtype for tensor in one.values()} == {torch.float64, torch.int64}
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-9, rtol=1e-9)
    (whole,), (first, second) = (steps_of(record_of(tmp_path / name).profile) for name in ("one", "two"))
    assert [row.process_index for row in (whole, first, second)] == [0, 0, 1]
    assert first.forward_s != second.forward_s
    # Each process has half of the images, and composes all kernels.
    assert whole.flops_forward / 2 < first.flops_forward == second.flops_forward < whole.flops_forward


@pytest.mark.distributed
def test_two_processes_store_features_once_and_train_the_same_adapter(arguments: list[str], tmp_path: Path) -> None:
    replay = ["adapter.target_modules=last-stage", "norm=recalibrate", "training.replay=true"]
    sources = next(argument for argument in arguments if argument.startswith("cache_dir="))
    for name, launcher in (("one", ()), ("two", TWO_PROCESSES)):
        options = [argument for argument in arguments if argument != sources] + [f"cache_dir={tmp_path / name}_cache"]
        finish(start([*options, *replay], tmp_path / name, *launcher, script=IN_DOUBLE))
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
    finish(start(options, tmp_path / "one", script=IN_DOUBLE))
    finish(start(options, tmp_path / "two", *TWO_PROCESSES, script=IN_DOUBLE))
    assert (processes_of(tmp_path / "one"), processes_of(tmp_path / "two")) == ("1", "2")
    one, two = (load_file(next((tmp_path / name).glob("*/*.safetensors"))) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-9, rtol=1e-9)
