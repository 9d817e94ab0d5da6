"""Commands on many runs: study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from peft_edge.cli.options import count, limit, path
from peft_edge.config import check_grid_keys
from peft_edge.plan import BYTES, parse_bytes


def study(
    grid: Annotated[Path, path("FILE", "A YAML file, such as configs/study/methods.yaml.")],
    output_dir: Annotated[Path, path("FOLDER", "The parent of the folders of all runs.")],
    jobs: Annotated[int | None, count("The number of runs at a time, each in its own process; by default 1.")] = None,
    results: Annotated[Path | None, path("FOLDER", "Folder of the records; by default OUTPUT_DIR/results.")] = None,
    cluster: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Run on the Ray cluster at this address (HOST:PORT), on the cluster that this machine belongs to "
            "(auto), or on a new cluster of this machine alone (local).",
        ),
    ] = None,
    num_cpus: Annotated[float | None, Option(min=0.0, help="CPU cores for a run; by default its num_threads.")] = None,
    num_gpus: Annotated[float | None, Option(min=0.0, help="GPUs for a run, such as 0.5; by default none.")] = None,
    memory: Annotated[int | None, limit(parse_bytes, BYTES, "4GiB", "Memory that Ray reserves for a run")] = None,
    artifacts: Annotated[
        str | None,
        Option(metavar="ADDRESS", help="Where the nodes save adapters and models, such as s3://bucket/runs."),
    ] = None,
) -> None:
    """Run a grid of training runs or cost analyses, and print a table.

    The grid file lists values for the keys of a configuration or of a cost analysis. The command runs every combination
    of these values. Finished runs are not repeated, and a failed run does not stop the other runs. With --cluster, the
    runs are tasks on a Ray cluster, and their records and logs are copied back to the output folder. The options
    --num-cpus, --num-gpus, --memory and --artifacts need --cluster.
    """
    check_grid_keys(grid)
    from peft_edge.study import Cluster, read_grid, run_grid, study_table

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "artifacts": artifacts}
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if cluster is None and given:
        names = ", ".join(given)
        raise ValueError(f"{names}: needs --cluster, such as --cluster local for Ray on this machine alone")
    if cluster is not None and jobs is not None:
        raise ValueError("--jobs and --cluster exclude each other: --num-cpus says how many runs share a node")
    planned = read_grid(grid, output_dir)
    run_grid(
        planned,
        processes=jobs or 1,
        results=results or output_dir / "results",
        cluster=None if cluster is None else Cluster(cluster, num_cpus, num_gpus or 0.0, memory, artifacts),
    )
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
    """Write a page, figures and data files from records.

    Writes README.md, figures (PNG and SVG), data.csv, and a CSV file for each section. The same records give
    byte-identical files. The command does not change other files in the output folder.
    """
    from peft_edge.report import write_report

    for file in write_report(records, out, bench=bench):
        print(file)
