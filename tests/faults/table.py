"""Write the table of faults in reports/. Each test that causes a fault writes one record."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "PEFT_EDGE_FAULTS"
"""The environment variable with the folder for records; if it is not set, none are written."""


@dataclass(frozen=True)
class Fault:
    """A fault, and how the program reacted to it."""

    fault: str
    answer: str
    """The reaction of the program."""

    stop_s: float | None
    """Seconds from the fault until the program had stopped; None if it continued, or was not measured."""

    recover_s: float | None
    """Seconds the same command took to complete the run; None if there was nothing to recover."""

    lost: str


def add(fault: Fault) -> None:
    """Write the record of `fault`, and the page with all faults, to the folder in the variable `PEFT_EDGE_FAULTS`.

    If this environment variable is not set, write nothing.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in fault.fault.lower()).split())
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(fault), indent=2) + "\n", encoding="utf-8")
    (Path(folder) / "README.md").write_text(page(read(Path(folder))), encoding="utf-8")


def read(folder: Path) -> list[Fault]:
    return [Fault(**json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.json"))]


def page(faults: list[Fault]) -> str:
    rows = [
        f"| {fault.fault} | {fault.answer} | {_seconds(fault.stop_s)} | {_seconds(fault.recover_s)} | {fault.lost} |"
        for fault in faults
    ]
    return "\n".join(
        [
            "# When things go wrong",
            "",
            "How short runs of `train.py` react to faults: LoRA on mobilenetv3_small_050, images of 32 px, mostly",
            "two trainings of nine steps with a checkpoint after every second step, on one CPU core. Recovery",
            "means that the same command, started again, completes the run. The run continues from its newest",
            "valid checkpoint, and its adapter is bit-identical to that of an undisturbed run. The columns have",
            "the seconds until the process has ended, and the seconds of the second start, mostly without the",
            "import of torch. A dash means that there is nothing to stop or to recover, or that it was not",
            "measured. The tests write this page from the records in this folder:",
            "",
            "```bash",
            f'{FOLDER}=reports/faults pytest -m "slow or distributed" tests/faults',
            "```",
            "",
            "| fault | `train.py` | stopped after [s] | recovered in [s] | lost |",
            "| --- | --- | ---: | ---: | --- |",
            *rows,
            "",
        ]
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
