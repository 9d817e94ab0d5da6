"""Commands on many runs: study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peft_edge.cli.options import count, path
from peft_edge.config import check_grid_keys


def study(
    grid: Annotated[Path, path("FILE", "A YAML file, such as configs/study/methods.yaml.")],
    output_dir: Annotated[Path, path("FOLDER", "The parent of the folders of all runs.")],
    jobs: Annotated[int, count("Parallel processes, each on one CPU core.")] = 1,
    results: Annotated[Path | None, path("FOLDER", "Folder of the records; by default OUTPUT_DIR/results.")] = None,
) -> None:
    """Run a grid of training runs or cost analyses, and print a table.

    Runs every combination in the grid. Finished runs are not repeated, and a failed run does not stop the other runs.
    To share a grid among machines, start this command on each machine with the same output folder.
    """
    check_grid_keys(grid)
    from peft_edge.study import read_grid, run_grid, study_table

    planned = read_grid(grid, output_dir)
    run_grid(planned, processes=jobs, results=results or output_dir / "results")
    print(study_table(planned))
    if failed := [job for job in planned if not job.is_finished]:
        raise ValueError(
            f"{len(failed)} of {len(planned)} failed: {failed[0].log} says why the first run failed. Run the same "
            "command again to repeat the failed runs"
        )


def report(
    records: Annotated[Path, path("FOLDER", "Records of runs, such as reports/results.")],
    out: Annotated[Path, path("FOLDER", "The output folder, such as reports.")],
    bench: Annotated[Path | None, path("FOLDER", "Records of peft-edge bench, for a section on step time.")] = None,
) -> None:
    """Write a page, figures and a data file from records.

    Writes README.md, figures (PNG and SVG) and data.csv. The same records give byte-identical files. Other files in the
    output folder are unchanged.
    """
    from peft_edge.report import write_report

    for file in write_report(records, out, bench=bench):
        print(file)
