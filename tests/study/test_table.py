from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from peft_edge.config import RunConfig
from peft_edge.records import DIVERGED, FAILED, SUCCESS, CostRecord, Record, StepProfile
from peft_edge.study.cells import Cell, RunCell
from peft_edge.study.table import study_table
from tests.study.support import record_of


@dataclass(frozen=True)
class KnownRun(RunCell):
    """Whose record is given."""

    known: Record | None

    @property
    def record(self) -> Record | None:
        return self.known


@dataclass(frozen=True)
class KnownCost(Cell):
    """An analysis whose record is given."""

    known: CostRecord | None

    @property
    def result_name(self) -> str:
        return self.name

    @property
    def record(self) -> CostRecord | None:
        return self.known

    def run(self) -> None:
        raise NotImplementedError

    def record_failure(self, reason: str) -> None:
        raise NotImplementedError


def run(setting: str, status: str | None, accuracy: float = 0.0, train_time: float | None = None) -> KnownRun:
    config = RunConfig(output_dir="a")
    if status is None:
        return KnownRun(setting, Path("a"), config, None)
    record = record_of(config, status)
    if status == SUCCESS:
        record.train_info.metrics = [{"test accuracy": accuracy, "source test accuracy": 0.5, "retention": 0.25}]
        record.train_info.file_size = 12345
        record.train_info.train_time = train_time
    return KnownRun(setting, Path("a"), config, record)


def cost(setting: str, profile: StepProfile | None) -> KnownCost:
    record = profile and CostRecord(
        created_at="",
        network="net",
        kind="standard",
        method="full",
        setting={},
        num_total_params=1,
        profile=profile,
        package_info={},
    )
    return KnownCost(setting, Path("a"), record)


def lines_of(cells: list[Cell]) -> list[list[str]]:
    return [line.split("  ") for line in study_table(cells).splitlines()]


def cells_of(line: list[str]) -> list[str]:
    return [cell.strip() for cell in line if cell.strip()]


def test_runs_are_averaged_over_seeds() -> None:
    accuracies = [0.7, 0.75, 0.83]
    title, row = map(cells_of, lines_of([run("task, lora", SUCCESS, accuracy) for accuracy in accuracies]))
    assert title == [
        "runs", "accuracy", "source accuracy", "retained", "trained parameters", "saved bytes", "training seconds"
    ]  # fmt: skip
    spread = f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}"
    assert row == ["task, lora", "3", spread, "0.500", "0.250", "-", "12,345", "-"]


def test_what_did_not_succeed_is_said_and_not_averaged() -> None:
    runs = [run("a", SUCCESS, 0.9), run("b", DIVERGED), run("a", FAILED), run("a", None)]
    first, second = map(cells_of, lines_of(runs)[1:])
    assert first[:3] == ["a", "1, failed, not run", "0.900"]
    assert second[:3] == ["b", "0, diverged", "-"]


def test_analyses_have_a_table_of_their_own() -> None:
    profile = StepProfile(
        process_index=0,
        scope="step",
        memory_peak_bytes=3 * 2**20,
        flops_forward=1_234_000_000,
        flops_backward=2_500_000_000,
    )
    table = lines_of([cost("net, full", profile), run("a", None), cost("net, lora", None)])
    assert [cells_of(line) for line in table[3:]] == [
        ["analyses", "peak MiB", "forward GFLOP", "backward GFLOP"],
        ["net, full", "1", "3.0", "1.23", "2.50"],
        ["net, lora", "0, not run", "-", "-", "-"],
    ]
    assert study_table([]) == ""
