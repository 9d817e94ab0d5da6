"""The `peft-edge` command: arguments and printing; what it does stands elsewhere in the package."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from peft_edge import __version__
from peft_edge.backbones import load_backbone
from peft_edge.bench import CONTENDERS, bench_table, run_bench, save_bench_figure
from peft_edge.export.commands import add_commands as add_export_commands
from peft_edge.files import atomic_write
from peft_edge.methods import METHODS, OPTIMIZERS
from peft_edge.plan import (
    BYTES,
    FLOPS,
    LORA_RANKS,
    METHODS_TO_PLAN,
    PLACEMENTS,
    Budget,
    find_plan,
    parse_bytes,
    parse_flops,
    plan_table,
)
from peft_edge.profiling.analysis import compare_methods
from peft_edge.profiling.figures import FORMATS, save_cost_figure
from peft_edge.profiling.flops import ACCOUNTINGS
from peft_edge.profiling.tables import cost_table
from peft_edge.report import write_report
from peft_edge.roles import ROLES
from peft_edge.study import read_grid, run_grid, study_table
from peft_edge.tuners.norm import Norm


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, by default those of the process."""
    parser = argparse.ArgumentParser(prog="peft-edge", description="Parameter-efficient fine-tuning for edge CNNs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_profile(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_study(commands)
    _add_report(commands)
    add_export_commands(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped: what was finished is kept\n")


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="what a training step costs, without training",
        description="Prints FLOPs and memory of one training step for each method and LoRA rank. Nothing is computed: "
        "the step runs on tensors that have a shape and no values, in seconds and in no more memory than the weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    _add_step(parser)
    add("--method", nargs="+", default=["full", "lora"], choices=METHODS, help="one or several")
    add("--lora-rank", nargs="+", type=positive_integer, default=[4], help="one or several")
    add(
        "--target-modules",
        type=_pattern,
        help=f"{', '.join(ROLES)}, or a regular expression; each method's own if not given",
    )
    add("--norm", default="stats", choices=get_args(Norm), help="what methods change in the BatchNorm layers")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="in the method's form, with its defaults")
    add("--accounting", default="exact", choices=ACCOUNTINGS, help="how FLOPs are counted")
    add("--json", metavar="FILE", type=_file, help="write the figures, too; - prints them and no table")
    add("--picture", metavar="FILE", type=_picture, help="draw them, too: a .png, .svg or .pdf file")
    parser.set_defaults(run=_profile)


def _add_step(parser: argparse.ArgumentParser, *, num_classes: int | None = None) -> None:
    add = parser.add_argument
    add("--backbone", required=True, help="a timm model name, or the folder of a saved model")
    head = "outputs of the head that is trained" + ("" if num_classes else "; timm's if not given")
    add("--num-classes", type=positive_integer, default=num_classes, help=head)
    add("--batch-size", type=positive_integer, default=16, help="images in the step")
    add("--image-size", type=positive_integer, default=224, help="height and width in pixels")


def _profile(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone, options.num_classes)
    costs = compare_methods(
        backbone,
        options.method,
        lora_ranks=options.lora_rank,
        adapter={"norm": options.norm} | ({"target_modules": targets} if (targets := options.target_modules) else {}),
        batch_size=options.batch_size,
        image_size=options.image_size,
        optimizer=options.optimizer,
        accounting=options.accounting,
    )
    num_classes = backbone.num_classes
    names = ("backbone", "target_modules", "norm", "batch_size", "image_size", "optimizer", "accounting")
    setting = {"num_classes": num_classes, **{name: getattr(options, name) for name in names}}
    text = json.dumps({**setting, "costs": {name: asdict(cost) for name, cost in costs.items()}}, indent=2) + "\n"
    title = (
        f"{options.backbone}, {num_classes} classes, batch {options.batch_size}, {options.image_size} px, "
        f"{options.optimizer}"
    )
    _show(text, f"One training step of {title}\n\n{cost_table(costs)}", options.json)
    if options.picture is not None:
        save_cost_figure(costs, options.picture, title=title)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits a budget of memory, arithmetic and bytes",
        description="Lists the methods, placements and ranks that fit, each with the mildest lean setting that it "
        "needs, and says why the others do not. Nothing is computed: steps run on tensors that have a shape and no "
        "values.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    _add_step(parser)
    units = f"a number and one of {', '.join(BYTES)}"
    add("--memory", type=_amount(parse_bytes), metavar="256MiB", help=f"of a step's tensors at the peak: {units}")
    add(
        "--flops",
        type=_amount(parse_flops),
        metavar="3GFLOP",
        help=f"of a step: a number and one of {', '.join(FLOPS)}",
    )
    add("--adapter-bytes", type=_amount(parse_bytes), metavar="200KiB", help=f"of the saved update: {units}")
    add("--method", nargs="+", default=METHODS_TO_PLAN, choices=METHODS, help="one or several")
    add("--target-modules", nargs="+", type=_pattern, default=PLACEMENTS, help="one or several placements of adapters")
    add("--lora-rank", nargs="+", type=positive_integer, default=LORA_RANKS, help="one or several")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="in the method's form, with its defaults")
    add("--records", type=Path, metavar="FOLDER", help="with records of runs, to order what fits by their accuracy")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    budget = Budget(memory_bytes=options.memory, flops=options.flops, adapter_bytes=options.adapter_bytes)
    backbone = load_backbone(options.backbone, options.num_classes)
    plan = find_plan(
        backbone,
        budget,
        methods=options.method,
        target_modules=options.target_modules,
        lora_ranks=options.lora_rank,
        batch_size=options.batch_size,
        image_size=options.image_size,
        optimizer=options.optimizer,
        records=options.records,
    )
    title = f"{options.backbone}, {backbone.num_classes} classes, batch {options.batch_size}, {options.image_size} px"
    print(f"Training steps of {title}, {options.optimizer}; {budget}\n\n{plan_table(plan)}")


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="our methods against their peers, measured on this machine",
        description="Measures training steps of full fine-tuning, of PEFT, LyCORIS and loralib where they are "
        "installed, and of our methods: time in interleaved rounds, as a multiple of full fine-tuning's, and memory "
        "and FLOPs. Takes minutes, and is worth most on a machine that does nothing else.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    _add_step(parser, num_classes=10)
    add("--methods", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="METHOD", help="one or several")
    add("--lora-rank", type=positive_integer, default=4, help="of all adapters")
    add("--rounds", type=positive_integer, default=7, help="timed steps of each method")
    add("--threads", type=positive_integer, default=1, help="of the CPU")
    add("--json", metavar="FILE", type=_file, help="write the record, too; - prints it and no table")
    add("--picture", metavar="FILE", type=_picture, help="draw memory and time, too: a .png, .svg or .pdf file")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    record = run_bench(
        options.backbone,
        options.methods,
        num_classes=options.num_classes,
        batch_size=options.batch_size,
        image_size=options.image_size,
        lora_rank=options.lora_rank,
        rounds=options.rounds,
        threads=options.threads,
    )
    _show(record.to_json(), bench_table(record), options.json)
    if options.picture is not None:
        save_bench_figure(record, options.picture)


def _add_study(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="a grid of runs or analyses, and a table of what came of them",
        description="Does every combination in a grid, and prints a table. What is finished is not done again, and "
        "what fails does not stop the rest. Several of these commands, on one machine or more, share a grid through "
        "its folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--grid", required=True, type=Path, help="a YAML file, such as configs/study/methods.yaml")
    add("--output-dir", required=True, type=Path, help="each run gets a folder in it")
    add("--jobs", type=positive_integer, default=1, help="processes side by side, each on one CPU core")
    add("--results", type=Path, metavar="FOLDER", help="gets every record; by default OUTPUT_DIR/results")
    parser.set_defaults(run=_study)


def _study(options: argparse.Namespace) -> None:
    jobs = read_grid(options.grid, options.output_dir)
    run_grid(jobs, processes=options.jobs, results=options.results or options.output_dir / "results")
    print(study_table(jobs))
    if failed := [job for job in jobs if not job.is_finished]:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} failed: {failed[0].log} says why the first did. Run the same command again "
            "to try them again"
        )


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="a page, figures and a data file from records",
        description="Writes README.md, figures (PNG and SVG) and data.csv from the records of a study alone. The same "
        "records give the same bytes. What else lies in the folder stays.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--records", required=True, type=Path, metavar="FOLDER", help="with records, such as reports/results")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where to, such as reports")
    add("--bench", type=Path, metavar="FOLDER", help="with records of peft-edge bench, for a section on time")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    for file in write_report(options.records, options.out, bench=options.bench):
        print(file)


def _show(json_text: str, table: str, file: str | None) -> None:
    """Prints the table, and writes the JSON text where it was asked for."""
    if file == "-":
        sys.stdout.write(json_text)
        return
    print(table)
    if file is not None:
        _write(Path(file), json_text)


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        # A device or a pipe: written to, not replaced.
        path.write_text(text, encoding="utf-8")
        return
    with atomic_write(path.resolve()) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def positive_integer(text: str) -> int:
    """Reads an argument; argparse names this function in its message."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _amount(parse: Callable[[str], int]) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    return path


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no role and no regular expression: {error}") from error
    return text


def _file(text: str) -> str:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    return text
