"""The section on time: what `peft-edge bench` has measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from peft_edge.bench.results import BenchRecord, BenchRow
from peft_edge.report.markdown import NONE, counted, fixed, links, table


def read_bench(folder: Path) -> dict[str, BenchRecord]:
    """Returns the comparisons in a folder, by their files' names.

    Raises:
        ValueError: There is none, or a JSON file is none; the message names it.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found[file.name] = BenchRecord.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not a record of peft-edge bench: move it elsewhere ({error})") from error
    if not found:
        raise ValueError(f"{folder} holds no record of peft-edge bench: make one with --json, or leave --bench out")
    return found


def times_section(records: Mapping[str, BenchRecord]) -> str:
    """Returns the section.

    Args:
        records: By their files, seen from the page.
    """
    machines = sorted(
        {
            f"{record.system_info['processor']}, {counted(record.setting['threads'], 'thread')}"
            for record in records.values()
        }
    )
    return "\n\n".join(
        [
            "## Time and memory of a step, measured",
            "Steps of real networks, timed in interleaved rounds (`peft-edge bench`), each as a multiple of full "
            f"fine-tuning's in the same round; the median over rounds. On {'; '.join(machines)}.",
            _table(records, lambda row: fixed(row.ratio_median, 2)),
            "Peak of tensor memory of the same steps, in MiB:",
            _table(records, _peak),
            *_not_run(records),
        ]
    )


def _peak(row: BenchRow) -> str:
    peak = row.profile.memory_peak_bytes if row.profile is not None else None
    return NONE if peak is None else fixed(peak / 2**20, 0)


def _table(records: Mapping[str, BenchRecord], cell: Callable[[BenchRow], str]) -> str:
    labels = dict.fromkeys(row.label for record in records.values() for row in record.rows)
    rows = []
    for label in labels:
        found = {file: row for file, record in records.items() for row in record.rows if row.label == label}
        cells = [cell(found[file]) if file in found else NONE for file in records]
        rows.append([label, *cells, links(found)])
    networks = [
        f"{record.setting['backbone']}, batch {record.setting['batch_size']}, {record.setting['image_size']} px"
        for record in records.values()
    ]
    return table(["", *networks, "records"], rows)


def _not_run(records: Mapping[str, BenchRecord]) -> list[str]:
    errors = [
        f"- {record.setting['backbone']}, {row.label}: {row.error.splitlines()[0]}"
        for record in records.values()
        for row in record.rows
        if row.error
    ]
    return ["\n".join(["Did not run:", "", *errors])] if errors else []
