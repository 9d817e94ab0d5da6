"""Let torch allocate large tensors in huge pages, which makes training on a CPU faster.

Linux gives memory to a process page by page, in a page fault at the first access to each page. With pages of 4 KiB,
page faults take a quarter to a half of the time of a training step. A huge page of 2 MiB needs one page fault instead
of 512.

Importing this module does not import torch, so a program can call `use_huge_pages` before anything allocates a tensor.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

HUGE_PAGES_SWITCH = "THP_MEM_ALLOC_ENABLE"
"""The name of torch's environment variable for huge pages. If its value is 1, tensors of at least 2 MiB use huge pages.
Torch reads the variable at the first allocation, and child processes inherit it."""

_MAPPINGS = Path("/proc/self/smaps")


def use_huge_pages() -> None:
    """Let torch use huge pages in this process and its children, unless the user has set `HUGE_PAGES_SWITCH`.

    Call this function before torch allocates the first tensor. The pages stay small on systems other than Linux,
    and if Linux's setting `transparent_hugepage` is `never`.
    """
    os.environ.setdefault(HUGE_PAGES_SWITCH, "1")


def huge_page_state() -> str:
    """Return whether large tensors of this process are in huge pages: `yes`, `no` or `unknown`.

    The function allocates a tensor of 40 MiB, and reads from Linux whether this tensor is in huge pages. On systems
    other than Linux, the result is `unknown`.
    """
    import torch

    # Allocate more than 32 MiB. For a smaller tensor, malloc may reuse freed memory, whose pages may have another size.
    tensor = torch.ones(10 * 2**20)
    inside = False
    try:
        for line in _MAPPINGS.read_text().splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= tensor.data_ptr() < int(match[2], 16)
            elif inside and line.startswith("AnonHugePages:"):
                return "yes" if int(line.split()[1]) else "no"
    except OSError:
        pass  # only Linux has this file
    return "unknown"
