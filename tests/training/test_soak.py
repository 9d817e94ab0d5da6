from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("soak.py")
KILLS = int(os.environ.get("PEFT_EDGE_KILLS", "5"))


@pytest.mark.slow
def test_runs_that_are_killed_at_any_moment_end_with_the_same_bits(tmp_path: Path) -> None:
    """`PEFT_EDGE_KILLS=200 pytest -m slow tests/training/test_soak.py` takes half an hour."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "soak"), "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120 + 60 * KILLS)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == KILLS
    assert any(run["was_killed"] for run in found)
    assert [run for run in found if not run["is_identical"]] == []
