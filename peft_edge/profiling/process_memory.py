"""What the operating system and the CUDA allocator say of a process's memory, beside what the tracker adds up."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss_bytes() -> int | None:
    """Returns the physical memory that this process has now (resident set size); None where only Linux could tell."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int | None:
    """Returns the most physical memory that this process has had; None on Windows.

    Since its start, or on Linux since `reset_peak_rss`.
    """
    peak = _status_bytes("VmHWM")
    if peak is None and resource is not None:
        # POSIX leaves the unit open: macOS took bytes, everyone else kilobytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def reset_peak_rss() -> bool:
    """Sets the peak back to the memory that the process has now; returns whether the system let it (Linux may)."""
    try:
        # proc(5): 5 resets the peak, and nothing else.
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


class ProcessPeak:
    """Measures the peaks of this process inside its `with` block, of which there must be one at a time.

    Both counters of peaks are set back, so whoever else reads them finds what came after. The growth is more than what
    was alive by what malloc could not use again: for the tensors of a training step, under glibc, up to 75 % with its
    defaults and up to 5 % with `MALLOC_MMAP_THRESHOLD_=65536` in the environment.

    Attributes:
        peak_rss_bytes: The peak of the physical memory: in the block, or of the process so far where the counter cannot
            be set back; None on Windows.
        rss_growth_bytes: Its part above what the process had before the block. None where that cannot be told.
        cuda_peak_bytes: The peak of what the CUDA allocator gave out on `cuda_device`; None without one.

    Args:
        cuda_device: The CUDA device to watch, or None.
    """

    peak_rss_bytes: int | None = None
    rss_growth_bytes: int | None = None
    cuda_peak_bytes: int | None = None

    def __init__(self, cuda_device: torch.device | None = None) -> None:
        self._cuda_device = cuda_device
        self._rss_before: int | None = None

    def __enter__(self) -> ProcessPeak:
        if self._cuda_device is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda_device)
        # Memory that malloc kept of an earlier step would be used again, and not be seen to grow.
        _trim_heap()
        self._rss_before = rss_bytes() if reset_peak_rss() else None
        return self

    def __exit__(self, *exception: Any) -> None:
        self.peak_rss_bytes = peak_rss_bytes()
        if self._rss_before is not None and self.peak_rss_bytes is not None:
            self.rss_growth_bytes = self.peak_rss_bytes - self._rss_before
        if self._cuda_device is not None:
            self.cuda_peak_bytes = torch.cuda.max_memory_allocated(self._cuda_device)


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _trim_heap() -> None:
    """Gives the heap's free pages back to the system, where the C library is glibc."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
