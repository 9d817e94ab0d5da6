"""Render the pages of the report from their templates, and write them with the figures and CSV files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pandas import DataFrame

from peft_edge.bench.results import BenchRecord
from peft_edge.files import atomic_write
from peft_edge.records import Archive, Record, read_archive
from peft_edge.report import claims, frames
from peft_edge.report.photographs import photographs
from peft_edge.report.run_claims import accuracy_claim, choice_claim, decision_table, updates_claim

TITLES = {
    "memory": "Memory: depthwise-separable networks against language models",
    "arithmetic": "Arithmetic: the FLOPs of an update",
    "accuracy": "Accuracy under a shift and for unseen classes",
    "updates": "Update behaviour over the rank",
    "choice": "Which method to take",
}
"""The title of each section of the page."""


def write_report(records: Path, out: Path, *, bench: Path | None = None) -> list[Path]:
    """Write the report page with its figures and CSV files. The same records give identical files.

    If the page, a figure or a table cannot be created, no file is written. Files in `out` that do not belong to the
    report do not change.

    Args:
        records: Folder with records, which are JSON files with the results of training runs or of analysed training
            steps.
        out: The folder to write to. It receives the page `README.md`, the file `data.csv` with a row for each record,
            the folder `claims` with a CSV file for each section, and the folder `figures` with PNG and SVG files. It
            also receives `photographs.md` if any run used a data set that is not one of the embedded benchmarks
            (`EMBEDDED`).
        bench: Folder with records of `peft-edge bench`, which times training steps. If `bench` is None, the page
            contains no measured times.

    Returns:
        The paths of the written files.

    Raises:
        ValueError: If a folder has no records, a record is damaged, or two records describe the same run.
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    archive, folder = read_archive(records), _relative(records, out)
    command = f"peft-edge report --records {_from_beside(out, folder)} --out {out.resolve().name}"
    measured = {}
    if bench is not None:
        place = _relative(bench, out)
        measured = {f"{place}/{name}": record for name, record in frames.read_bench(bench).items()}
        command += f" --bench {_from_beside(out, place)}"
    pages, tables, charts = make_report(archive, folder, measured, command)
    with TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / "claims").mkdir()
        (made / "figures").mkdir()
        for name, page in pages.items():
            (made / name).write_text(page, encoding="utf-8")
        frames.archive_frame(archive, folder).to_csv(made / "data.csv", index=False, lineterminator="\n")
        for name, table in tables.items():
            # Six digits hide rounding errors, which depend on the order of summation.
            table.to_csv(made / "claims" / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
        for name, chart in charts.items():
            chart.draw(made / "figures" / name)
        files = sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
        for file in files:
            with atomic_write(out / file) as unfinished:
                unfinished.write_bytes((made / file).read_bytes())
    return [out / file for file in files]


def make_report(
    archive: Archive, folder: str, measured: Mapping[str, BenchRecord], command: str
) -> tuple[dict[str, str], dict[str, DataFrame], dict[str, claims.Chart]]:
    """Return the pages, the CSV tables and the figures of the report as three dicts with file names as keys.

    The names of tables and figures have no suffix. `archive` contains the records of runs and analysed steps, and
    `folder` is their folder. `measured` is a dict from paths to records of `peft-edge bench`. `folder` and these paths
    are relative to the folder of the pages. `command` is the shell command that creates the report. The page shows this
    command.
    """
    runs, costs = frames.run_frame(archive, folder), frames.cost_frame(archive, folder)
    timings, real = frames.timing_frame(measured), photographs(archive, runs)
    # If `is_real` is True, the data set of the run is not one of the embedded benchmarks. Such runs have their own
    # section, so the other sections leave them out. If there are no other runs, all sections contain them.
    if not runs.empty and not runs["is_real"].all():
        runs = runs[~runs["is_real"]]
    variants = frames.variant_frame(runs)
    sections = {
        "memory": claims.memory_claim(costs),
        "arithmetic": claims.arithmetic_claim(costs),
        "accuracy": accuracy_claim(runs, variants),
        "updates": updates_claim(frames.change_frame(archive, runs)),
        "choice": choice_claim(variants),
    }
    tables = {name: claim.data for name, claim in sections.items() if claim.data is not None}
    charts = {name: chart for claim in sections.values() for name, chart in claim.charts.items()}
    if real is not None:
        tables["photographs"] = real.data
    if measured:
        tables["timing"] = timings
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(table=claims.markdown_table, link=_link)
    names = set() if runs.empty else set(runs["name"])
    configs = [run.run_info.train_config for name, run in archive.finished.items() if name in names]
    page = environment.get_template("page.md.jinja").render(
        archive=archive,
        titles=TITLES,
        folder=folder,
        claims=sections,
        real=real,
        are_all_real=not runs.empty and bool(runs["is_real"].all()),
        decisions=decision_table(variants),
        timings=timings,
        timing_table=claims.timing_table(timings) if measured else None,
        command=command,
        # Rules of the verdicts.
        about_half=claims.ABOUT_HALF,
        agreeing_reduction=claims.AGREEING_REDUCTION,
        standard_errors=frames.STANDARD_ERRORS,
        # Limits of the records.
        from_scratch=bool(configs) and not any(config["backbone"].get("pretrained") for config in configs),
        seeds=[] if variants.empty else sorted(variants["full_seeds"].unique()),
        data_sets=sorted({config["data"]["name"] for config in configs}),
        image_sizes=sorted({config["data"]["image_size"] for config in configs}),
        not_compared=[] if costs.empty else list(costs.loc[~costs["is_reference"] & costs["full_file"].isna(), "file"]),
        # Origin of the records.
        machines=Counter(map(_machine, archive.runs.values())),
        versions=Counter(
            ", ".join(f"{name.removesuffix('-version')} {version}" for name, version in sorted(packages.items()))
            for packages in [
                *(run.meta_info.package_info for run in archive.runs.values()),
                *(cost.package_info for cost in archive.costs.values()),
            ]
        ),
    )
    pages = {"README.md": page}
    if real is not None:
        pages["photographs.md"] = environment.get_template("photographs.md.jinja").render(real=real, titles=TITLES)
    return pages, tables, charts


def _machine(run: Record) -> str:
    system, threads = run.meta_info.system_info, run.run_info.train_config["num_threads"]
    names = [system.get(key) or f"unknown {key}" for key in ("system", "machine", "processor")]
    accelerator = f"accelerator {system.get('accelerator', 'unknown')}"
    return ", ".join([*names, accelerator, f"{threads} CPU thread{'' if threads == 1 else 's'} per process"])


def _link(file: str) -> str:
    return f"[{Path(file).stem}]({quote(file, safe='/=,')})"


def _relative(folder: Path, out: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()


def _from_beside(out: Path, folder: str) -> str:
    """Convert `folder`, a path relative to `out`, to a path relative to the parent of `out`.

    The report page shows a command that contains the converted path. Users run this command in the parent of `out`.
    """
    return Path(os.path.normpath(Path(out.resolve().name) / folder)).as_posix()
