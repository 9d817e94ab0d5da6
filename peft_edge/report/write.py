"""Writes the report: all of it is made before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from peft_edge.files import atomic_write
from peft_edge.records import read_archive
from peft_edge.report.costs import cost_rows
from peft_edge.report.data_file import data_file
from peft_edge.report.page import Rows, claims_of, page
from peft_edge.report.runs import run_rows
from peft_edge.report.times import read_bench

PAGE, DATA, FIGURES = "README.md", "data.csv", "figures"


def write_report(records: Path, out: Path, *, bench: Path | None = None) -> list[Path]:
    """Writes the page, its figures and the data file. The same records give the same bytes.

    What lies in the folder besides is left alone.

    Args:
        records: The folder with the records of runs and analyses.
        out: Where to: `README.md`, `data.csv`, and `figures` as PNG and SVG.
        bench: A folder with records of `peft-edge bench`.

    Returns:
        The files that were written.

    Raises:
        ValueError: There are no records, one is damaged, or two are of the same run.
        ImportError: matplotlib is missing. Nothing has been written.
        OSError: A file cannot be written.
    """
    archive, folder = read_archive(records), _seen_from(out, records)
    command = f"peft-edge report --records {_named(out, folder)} --out {out.resolve().name}"
    measured = {}
    if bench is not None:
        place = _seen_from(out, bench)
        measured = {f"{place}/{name}": record for name, record in read_bench(bench).items()}
        command += f" --bench {_named(out, place)}"
    rows = Rows(archive=archive, folder=folder, runs=run_rows(archive, folder), costs=cost_rows(archive, folder))
    claims = claims_of(rows)
    with TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / FIGURES).mkdir()
        for claim in claims:
            for name, draw in claim.pictures.items():
                draw(made / FIGURES / name)
        (made / PAGE).write_text(page(rows, claims, measured, command), encoding="utf-8")
        (made / DATA).write_text(data_file(archive, folder), encoding="utf-8")
        files = sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
        for file in files:
            with atomic_write(out / file) as unfinished:
                unfinished.write_bytes((made / file).read_bytes())
    return [out / file for file in files]


def _seen_from(out: Path, folder: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()


def _named(out: Path, folder: str) -> str:
    """As it is called from beside `out`: the page must not depend on where it is made."""
    return Path(os.path.normpath(Path(out.resolve().name) / folder)).as_posix()
