"""Renders the page from its template and writes the report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pandas import DataFrame

from peft_edge.bench.results import BenchRecord
from peft_edge.files import atomic_write
from peft_edge.records import Archive, Record, read_archive
from peft_edge.report.claims import (
    ABOUT_HALF,
    AGREEING_REDUCTION,
    Claim,
    arithmetic_claim,
    markdown_table,
    memory_claim,
    timing_table,
)
from peft_edge.report.frames import (
    STANDARD_ERRORS,
    archive_frame,
    change_frame,
    cost_frame,
    read_bench,
    run_frame,
    timing_frame,
    variant_frame,
)
from peft_edge.report.run_claims import accuracy_claim, choice_claim, decision_table, updates_claim

SECTIONS = {
    "memory": "Memory: depthwise-separable networks against language models",
    "arithmetic": "Arithmetic: the FLOPs of an update",
    "accuracy": "Accuracy under a shift and for unseen classes",
    "updates": "Update behaviour over the rank",
    "choice": "Which method to take",
}
"""The claims of the source study in the order of the page, with their titles."""


def write_report(records: Path, out: Path, *, bench: Path | None = None) -> list[Path]:
    """Write the page, its figures and its CSV files. The same records give the same bytes.

    Nothing is written before everything is made, and other files in the folder stay as they are.

    Args:
        records: Folder with the records of runs and analyses.
        out: Folder of the report. It gets `README.md`, `data.csv` with every record, `claims` with the full table of
            each section, and `figures` as PNG and SVG.
        bench: Folder with records of `peft-edge bench`.

    Returns:
        The files that were written.

    Raises:
        ValueError: If there are no records, one is damaged, or two describe the same run.
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    archive, folder = read_archive(records), _relative(records, out)
    command = f"peft-edge report --records {_from_beside(out, folder)} --out {out.resolve().name}"
    measured = {}
    if bench is not None:
        place = _relative(bench, out)
        measured = {f"{place}/{name}": record for name, record in read_bench(bench).items()}
        command += f" --bench {_from_beside(out, place)}"
    report = analyse(archive, folder, measured)
    with TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / "claims").mkdir()
        (made / "figures").mkdir()
        for name, claim in report.claims.items():
            if claim.data is not None:
                _write_csv(claim.data, made / "claims" / f"{name}.csv")
            for figure, chart in claim.charts.items():
                chart.draw(made / "figures" / figure)
        if not report.timings.empty:
            _write_csv(report.timings, made / "claims" / "timing.csv")
        archive_frame(archive, folder).to_csv(made / "data.csv", index=False, lineterminator="\n")
        (made / "README.md").write_text(render_page(report, command), encoding="utf-8")
        files = sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
        for file in files:
            with atomic_write(out / file) as unfinished:
                unfinished.write_bytes((made / file).read_bytes())
    return [out / file for file in files]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows."""

    archive: Archive

    folder: str
    """Path of the records, relative to the page."""

    variants: DataFrame
    """See `variant_frame`."""

    costs: DataFrame
    """See `cost_frame`."""

    timings: DataFrame
    """See `timing_frame`."""

    claims: Mapping[str, Claim]
    """The findings by the names of `SECTIONS`."""


def analyse(archive: Archive, folder: str, measured: Mapping[str, BenchRecord]) -> Report:
    """Compute all findings.

    Args:
        archive: The records.
        folder: Path of the records, relative to the page.
        measured: Comparisons of `peft-edge bench` by their paths, relative to the page.
    """
    runs, costs = run_frame(archive, folder), cost_frame(archive, folder)
    variants = variant_frame(runs)
    claims = {
        "memory": memory_claim(costs),
        "arithmetic": arithmetic_claim(costs),
        "accuracy": accuracy_claim(runs, variants),
        "updates": updates_claim(change_frame(archive, runs)),
        "choice": choice_claim(variants),
    }
    timings = timing_frame(measured)
    return Report(archive=archive, folder=folder, variants=variants, costs=costs, timings=timings, claims=claims)


def render_page(report: Report, command: str) -> str:
    """Return the page in Markdown.

    Args:
        report: The findings.
        command: The command that makes the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(table=markdown_table, link=_link)
    archive, costs = report.archive, report.costs
    configs = [run.run_info.train_config for run in archive.finished.values()]
    seeds = [] if report.variants.empty else sorted(report.variants["full_seeds"].unique())
    alone = [] if costs.empty else costs.loc[~costs["is_reference"] & costs["full_file"].isna(), "file"]
    return environment.get_template("page.md.jinja").render(
        report=report,
        claims=report.claims,
        titles=SECTIONS,
        command=command,
        decisions=decision_table(report.variants),
        timing=None if report.timings.empty else timing_table(report.timings),
        not_compared=list(alone),
        failures=[
            [*_failure(run), _link(f"{report.folder}/{name}")]
            for name, run in archive.runs.items()
            if name not in archive.finished
        ],
        # The limits of the records.
        from_scratch=bool(configs) and not any(config["backbone"].get("pretrained") for config in configs),
        seeds=" or ".join(f"{number} seed" if number == 1 else f"{number} seeds" for number in seeds),
        data_sets=_alternatives(config["data"]["name"] for config in configs),
        image_sizes=_alternatives(config["data"]["image_size"] for config in configs),
        # Rules of the verdicts.
        about_half=ABOUT_HALF,
        agreeing_reduction=AGREEING_REDUCTION,
        standard_errors=STANDARD_ERRORS,
        # Where the records come from.
        machines=Counter(map(_machine, archive.runs.values())),
        versions=Counter(
            ", ".join(f"{name.removesuffix('-version')} {version}" for name, version in sorted(packages.items()))
            for packages in [
                *(run.meta_info.package_info for run in archive.runs.values()),
                *(cost.package_info for cost in archive.costs.values()),
            ]
        ),
        times=[run.run_info.total_time for run in archive.runs.values() if run.run_info.total_time is not None],
    )


def _failure(run: Record) -> list[str]:
    config = run.run_info.train_config
    reason = (run.run_info.error_msg.strip().splitlines() or ["no reason given"])[-1].replace("|", "\\|")
    return [config["method"], config["backbone"]["name"], str(config.get("seed")), run.train_info.status, reason]


def _machine(run: Record) -> str:
    system, threads = run.meta_info.system_info, run.run_info.train_config["num_threads"]
    names = [system.get(key) or f"unknown {key}" for key in ("system", "machine", "processor")]
    accelerator = f"accelerator {system.get('accelerator', 'unknown')}"
    return ", ".join([*names, accelerator, f"{threads} CPU thread{'' if threads == 1 else 's'} per process"])


def _alternatives(values: Iterable[object]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def _link(file: str) -> str:
    return f"[{Path(file).stem}]({quote(file, safe='/=,')})"


def _write_csv(frame: DataFrame, file: Path) -> None:
    # Six digits, so that the order in which numbers are summed does not show.
    frame.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def _relative(folder: Path, out: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()


def _from_beside(out: Path, folder: str) -> str:
    """Return the path of a folder relative to the parent of `out`: the page must not depend on where it is made."""
    return Path(os.path.normpath(Path(out.resolve().name) / folder)).as_posix()
