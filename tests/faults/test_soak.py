from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
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

    def killed_and_resumed(number: int, moment: float) -> tuple[bool, float]:
        run = tmp_path / str(number) / "run"
        process = begin(run)
        process.join(moment)
        process.kill()
        code, _ = ended(process)
        recovery = completed(run)
        assert digest(run) == expected, log_of(run).read_text()
        shutil.rmtree(run.parent)
        return code == -9, recovery

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(killed_and_resumed, range(KILLS), [moments.uniform(0, seconds) for _ in range(KILLS)]))
    kills = sum(was_killed for was_killed, _ in found)
    assert kills > 0
    add(
        Fault(
            "kill -9 at a random moment",
            f"ends at once; started again, goes on from its last checkpoint ({kills} runs, all with the same adapter)",
            0.0,
            sum(recovery for _, recovery in found) / KILLS,
            "the steps since a checkpoint, which are trained again to the same bits",
        )
    )
