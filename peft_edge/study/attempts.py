"""One try at a cell: claimed, so that no two processes make it, and written down, whatever comes of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from peft_edge.archive import add_record
from peft_edge.hub.sharing import shareable
from peft_edge.records import CostRecord, Record
from peft_edge.study.cells import Cell


@dataclass(frozen=True)
class Attempt:
    """One try at a cell, which a process claims with a lock on `<folder>.lock` and loses when it dies."""

    cell: Cell
    """What is tried."""

    before: Record | CostRecord | None
    """Its record when the study began: another one means that another process has tried it since."""

    results: Path
    """The archive that gets its record."""

    patience_s: float = 0.0
    """Seconds to wait for a cell that another process has claimed."""

    def run(self) -> bool:
        """Does the cell, unless another process has done so since the study began.

        Returns:
            Whether it has been tried, by whomever. If not, another process has it.

        Raises:
            ValueError: A record is damaged; the message names the file.
            OSError: A file cannot be written.
        """
        return self._claimed(self._run)

    def fail(self, reason: str) -> bool:
        """Writes down that the process which did the cell has died; returns and raises what `run` does."""
        return self._claimed(lambda: self._fail(reason))

    def _claimed(self, do: Callable[[], None]) -> bool:
        try:
            with FileLock(self.cell.folder.with_name(f"{self.cell.name}.lock"), timeout=self.patience_s):
                if not self.cell.is_finished and not self._left_a_record():
                    do()
                record = self.cell.record
                if record is not None and not self._is_among_results(record):
                    add_record(self.results, self.cell.result_name, _public(record))
        except Timeout:
            return False
        return True

    def _run(self) -> None:
        try:
            with self.cell.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
                self.cell.run()
        except Exception as error:
            # Whatever it is, it is written down, and the others go on.
            self._fail("".join(traceback.format_exception(error)))

    def _fail(self, reason: str) -> None:
        with self.cell.log.open("a", encoding="utf-8") as log:
            print(reason, file=log)
        if not self._left_a_record():
            self.cell.record_failure(reason)

    def _left_a_record(self) -> bool:
        record = self.cell.record
        return record is not None and record != self.before

    @property
    def is_kept(self) -> bool:
        """Whether the cell is finished, and its record is among the results."""
        record = self.cell.record
        return record is not None and self.cell.is_finished and self._is_among_results(record)

    def _is_among_results(self, record: Record | CostRecord) -> bool:
        file = self.results / f"{self.cell.result_name}.json"
        try:
            return type(record).from_json(file.read_text(encoding="utf-8")) == _public(record)
        except (FileNotFoundError, ValueError):
            return False


def _public(record: Record | CostRecord) -> Record | CostRecord:
    """Results are shown to others, whom the paths of this machine do not concern."""
    return shareable(record) if isinstance(record, Record) else record
