from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.small_run import begin, completed, digest, ended, log_of
from tests.faults.table import Fault, add

KILLS = int(os.environ.get("PEFT_EDGE_KILLS", "4"))


@pytest.mark.slow
def test_runs_that_are_killed_at_any_moment_end_with_the_same_bits(tmp_path: Path) -> None:
    """`PEFT_EDGE_KILLS=200 pytest -m slow tests/faults/test_soak.py` takes half an hour."""
    seconds = completed(tmp_path / "whole" / "run")
    expected = digest(tmp_path / "whole" / "run")
    moments = random.Random(0)
    were_killed, recoveries = 0, []
    for number in range(KILLS):
        run = tmp_path / str(number) / "run"
        process = begin(run)
        process.join(moments.uniform(0, seconds))
        process.kill()
        code, _ = ended(process)
        were_killed += code == -9
        recoveries.append(completed(run))
        assert digest(run) == expected, log_of(run).read_text()
        shutil.rmtree(run.parent)
    assert were_killed > 0
    add(
        Fault(
            f"kill -9 at {KILLS} random moments ({KILLS - were_killed} of them after the end)",
            "ends at once; started again, it goes on from its last checkpoint",
            0.0,
            sum(recoveries) / len(recoveries),
            "at most the two steps since a checkpoint, which are trained again to the same bits",
        )
    )
