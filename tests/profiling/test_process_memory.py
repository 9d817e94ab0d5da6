"""The process's figures against allocations of known size, and against each other."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_edge.profiling import process_memory
from peft_edge.profiling.process_memory import ProcessPeak, peak_rss_bytes, reset_peak_rss, rss_bytes

MIB = 2**20
SIZE = 96 * MIB  # above what malloc ever takes from its heap, so that it goes back at once

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and resets the figures")
resettable = pytest.mark.skipif(not reset_peak_rss(), reason="the system does not let the peak be reset")


def touch(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8)


@linux
def test_current_memory_is_that_of_the_kernels_other_account() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])

    assert rss_bytes() == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)


@linux
def test_peak_is_that_of_getrusage() -> None:
    del_me = touch(SIZE)
    del del_me

    assert peak_rss_bytes() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)


@resettable
def test_growth_is_that_of_the_block_alone() -> None:
    kept, before = touch(SIZE), touch(2 * SIZE)
    del before
    with ProcessPeak() as peak:
        inside = touch(SIZE)
        del inside
    after = touch(2 * SIZE)

    assert peak.rss_growth_bytes == pytest.approx(SIZE, rel=0.1)
    assert peak.peak_rss_bytes is not None
    assert peak.peak_rss_bytes > kept.nbytes + SIZE
    assert peak.cuda_peak_bytes is None
    del after


def test_growth_is_unknown_where_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_memory, "_CLEAR_REFS", tmp_path / "no folder" / "clear_refs")
    with ProcessPeak() as peak:
        pass

    assert peak.rss_growth_bytes is None
    assert peak.peak_rss_bytes == peak_rss_bytes()


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_without_proc_the_peak_is_getrusages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, unit: int
) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(sys, "platform", platform)

    assert rss_bytes() is None
    assert peak_rss_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_without_either_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(process_memory, "resource", None)

    assert peak_rss_bytes() is None


STEP = """
import sys, timm, torch
from peft_edge.profiling.memory import track_memory
torch.set_num_threads(1)
model = timm.create_model(sys.argv[1], num_classes=10).train()
images = torch.randn(int(sys.argv[2]), 3, 160, 160)
profile = track_memory(model, images, optimizer=torch.optim.AdamW(model.parameters()))
print(profile.rss_growth_bytes, profile.peak_bytes - profile.start_bytes)
"""


@linux
@resettable
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "batch_size"), [("mobilenetv2_100", 16), ("mobilenetv3_small_100", 32), ("resnet18", 16)]
)
def test_the_process_grows_in_a_step_by_what_the_tracker_adds_up(backbone: str, batch_size: int) -> None:
    # A fresh process whose malloc gives freed blocks back: the growth is then the tensors', not what malloc hoards.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEP, backbone, str(batch_size)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    growth, tracked = map(int, finished.stdout.split())

    assert growth == pytest.approx(tracked, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_that_of_the_block_alone() -> None:
    device = torch.device("cuda", 0)
    before = torch.zeros(4 * MIB, device=device)
    del before
    allocated = torch.cuda.memory_allocated(device)
    with ProcessPeak(device) as peak:
        inside = torch.zeros(MIB, device=device)
        del inside

    assert peak.cuda_peak_bytes == allocated + 4 * MIB
