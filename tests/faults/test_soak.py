from __future__ import annotations

import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.small_run import begin, completed, digest, ended, log_of
from tests.faults.table import Fault, add

KILLS = int(os.environ.get("PEFT_EDGE_KILLS", "4"))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_identical_bits(tmp_path: Path) -> None:
    """`PEFT_EDGE_KILLS=200 pytest -m slow tests/faults/test_soak.py` runs for half an hour."""
    seconds = completed(tmp_path / "whole" / "run")
    expected = digest(tmp_path / "whole" / "run")

    def is_killed(run: Path, moment: float) -> bool:
        process = begin(run)
        process.join(moment)
        process.kill()
        return ended(process)[0] == -signal.SIGKILL

    def killed_and_resumed(number: int) -> float:
        run, moments = tmp_path / str(number) / "run", random.Random(number)
        while not is_killed(run, moments.uniform(0, seconds)):
            shutil.rmtree(run.parent)  # the run ended before the kill
        recovery = completed(run)
        assert digest(run) == expected, log_of(run).read_text()
        shutil.rmtree(run.parent)
        return recovery

    with ThreadPoolExecutor(2) as pool:
        recoveries = list(pool.map(killed_and_resumed, range(KILLS)))
    add(
        Fault(
            "kill -9 at a random moment",
            f"ends at once; the next start continues from the last checkpoint ({KILLS} runs, all with equal adapters)",
            None,
            sum(recoveries) / KILLS,
            "the steps since the last checkpoint; repeating them gives the same bits",
        )
    )
