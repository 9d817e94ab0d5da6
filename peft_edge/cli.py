"""The `peft-edge` command: arguments and printing; what it does stands elsewhere in the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_edge.files import written_whole
from peft_edge.methods import METHODS
from peft_edge.profiling.analysis import OPTIMIZERS
from peft_edge.profiling.comparison import compare_methods
from peft_edge.profiling.figures import FORMATS, save_cost_figure
from peft_edge.profiling.flops import ACCOUNTINGS
from peft_edge.profiling.tables import cost_table
from peft_edge.roles import ROLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, by default those of the process."""
    parser = argparse.ArgumentParser(prog="peft-edge", description="Parameter-efficient fine-tuning for edge CNNs.")
    commands = parser.add_subparsers(title="commands", required=True)
    _add_profile(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="what a training step costs, without training",
        description="Prints FLOPs and memory of one training step for each method and LoRA rank. Nothing is computed: "
        "the step runs on tensors that have a shape and no values, in seconds and without the network's memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", required=True, help="a timm model name, such as mobilenetv2_100")
    parser.add_argument("--method", nargs="+", default=["full", "lora"], choices=METHODS, help="one or several")
    parser.add_argument("--lora-rank", nargs="+", type=_positive, default=[4], help="one or several")
    parser.add_argument("--target-modules", default="all-conv", help=f"adapted layers: {', '.join(ROLES)}, or a regex")
    parser.add_argument("--batch-size", type=_positive, default=16, help="images in the step")
    parser.add_argument("--image-size", type=_positive, default=224, help="height and width in pixels")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="with torch's defaults")
    parser.add_argument("--accounting", default="exact", choices=ACCOUNTINGS, help="how FLOPs are counted")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - prints them instead of the table")
    parser.add_argument("--picture", metavar="FILE", type=_picture, help="draw them: a .png, .svg or .pdf file")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> None:
    costs = compare_methods(
        options.backbone,
        options.method,
        lora_ranks=options.lora_rank,
        target_modules=options.target_modules,
        batch_size=options.batch_size,
        image_size=options.image_size,
        optimizer=options.optimizer,
        accounting=options.accounting,
    )
    names = ("backbone", "target_modules", "batch_size", "image_size", "optimizer", "accounting")
    setting = {name: getattr(options, name) for name in names}
    text = json.dumps({**setting, "costs": {name: asdict(cost) for name, cost in costs.items()}}, indent=2) + "\n"
    title = f"{options.backbone}, batch {options.batch_size}, {options.image_size} px, {options.optimizer}"
    if options.json == "-":
        sys.stdout.write(text)
    else:
        print(f"One training step of {title}\n\n{cost_table(costs)}")
        if options.json is not None:
            with written_whole(Path(options.json)) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    if options.picture is not None:
        save_cost_figure(costs, options.picture, title=title)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    return path
