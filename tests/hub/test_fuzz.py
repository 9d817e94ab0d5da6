from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel

from peft_edge.hub import save_adapter

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("PEFT_EDGE_FUZZ", "200"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory limits depend on the system")
def test_damaged_and_hostile_adapters_are_loaded_or_refused(small_model: PeftModel, tmp_path: Path) -> None:
    """`PEFT_EDGE_FUZZ=2000 pytest -m slow tests/hub/test_fuzz.py` takes about ten minutes."""
    save_adapter(small_model, tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "adapter" / "source_model")
    command = [sys.executable, "-m", "tests.hub.fuzz_worker", str(tmp_path / "adapter"), "0", str(CASES)]
    worker = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    outcomes = [json.loads(line)["outcome"] for line in worker.stdout.splitlines()]
    assert worker.returncode == 0, f"seed {len(outcomes)} ended the process: {worker.stderr[-2000:]}"
    kinds = collections.Counter(outcome.partition(":")[0] for outcome in outcomes)
    wrong = {seed: outcome for seed, outcome in enumerate(outcomes) if not outcome.startswith(("loaded", "refused:"))}
    assert not wrong
    assert sum(kinds.values()) == CASES
    # Some cases are loaded, and most are refused.
    assert kinds["loaded"] > CASES / 50
    assert kinds["refused"] > CASES / 2
