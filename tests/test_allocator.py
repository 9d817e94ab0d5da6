"""torch allocates large tensors in huge pages if the variable is set early enough, and the user's own value counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_edge import allocator
from peft_edge.allocator import HUGE_PAGES_SWITCH, huge_page_state, use_huge_pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PR_SET_THP_DISABLE = 41

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are a setting of Linux")


def run(program: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != HUGE_PAGES_SWITCH}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**environment, **variables}, capture_output=True, text=True, check=True
    ).stdout.split()


# The kernel writes the flag "hg" beside a mapping for which a program has asked for huge pages.
FLAGS = """
import re, torch
from pathlib import Path
tensor = torch.empty(10 * 2**20)
address = tensor.data_ptr()
inside = False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(match[1], 16) <= address < int(match[2], 16)
    elif inside and line.startswith("VmFlags:"):
        print("hg" in line.split())
"""


def test_torch_asks_for_huge_pages_in_this_process_and_its_children() -> None:
    start = "from peft_edge.allocator import use_huge_pages; use_huge_pages()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FLAGS!r}], check=True)"
    assert run(f"{start}\n{child}") == ["True"]
    assert run(f"{start}\n{FLAGS}", **{HUGE_PAGES_SWITCH: "0"}) == ["False"]


STATE = """
from peft_edge.allocator import huge_page_state, use_huge_pages
{before}
use_huge_pages()
print(huge_page_state())
"""


@pytest.mark.skipif(not MODE.exists() or "[never]" in MODE.read_text(), reason="Linux gives no huge pages here")
def test_state_is_what_linux_has_done() -> None:
    assert run(STATE.format(before="")) == ["yes"]
    # For this process, Linux behaves as with the setting `never`.
    never = f"import ctypes; assert not ctypes.CDLL(None).prctl({PR_SET_THP_DISABLE}, 1, 0, 0, 0)"
    assert run(STATE.format(before=never)) == ["no"]


def test_the_users_own_value_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUGE_PAGES_SWITCH, "0")
    use_huge_pages()
    assert os.environ[HUGE_PAGES_SWITCH] == "0"
    monkeypatch.delenv(HUGE_PAGES_SWITCH)
    use_huge_pages()
    assert os.environ[HUGE_PAGES_SWITCH] == "1"


def test_state_is_unknown_where_linux_does_not_report_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator, "_MAPPINGS", tmp_path / "none")
    assert huge_page_state() == "unknown"
