"""The `peft-edge` command.

Arguments are checked before torch is imported, so each command imports its modules inside its function. The constants
in this file repeat names from these modules, and a test checks that the names agree.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from typer import Argument, BadParameter, Option
from typer.core import TyperCommand
from typer.models import OptionInfo

from peft_edge import __version__
from peft_edge.config.schema import METHOD_NAMES, OPTIMIZER_NAMES, ROLE_NAMES
from peft_edge.files import atomic_write
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
from peft_edge.records import JsonObject, Record, read_record

if TYPE_CHECKING:
    from torch import nn

Accounting = Literal["exact", "source-study"]
CONTENDERS = [
    *("full", "inference", "peft-lora", "peft-dora", "lycoris-locon", "loralib"),
    *("lora-plain", "lora-dense", "lora-byte", "lora-recompute", "lora-stats", "lora-all-conv", "lora-project"),
    *("lora-fa-project", "dora-dense", "galore"),
]
EXPORT_FORMATS = ("onnx", "torch-export", "executorch")
NORMS = ("frozen", "recalibrate", "stats", "affine")
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class Command(TyperCommand):
    """A command that accepts several values after one option, and prints expected errors without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # the type of ctx is private
        """Expand `--method full lora` to `--method full --method lora`, and complete abbreviated options."""
        lists = {name: getattr(option, "multiple", False) for option in self.params for name in option.opts}
        expanded: list[str] = []
        repeated = None
        for position, argument in enumerate(args):
            name, *value = argument.split("=", 1)
            matches = [option for option in lists if name.startswith("--") and option.startswith(name)]
            if name not in lists and len(matches) == 1:
                (name,) = matches
            if argument.startswith("--"):
                repeated = name if lists.get(name) else None
                expanded.append("=".join([name, *value]))
            elif repeated and not args[position - 1].startswith("--"):
                expanded += [repeated, argument]
            else:
                expanded.append(argument)
        return super().parse_args(ctx, expanded)

    def invoke(self, ctx: Any) -> object:
        """Run the command. Exit with code 2 after a ValueError, OSError or ImportError, with code 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("stopped: finished results are kept", file=sys.stderr)
            raise typer.Exit(130) from error


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            nearest = difflib.get_close_matches(text, names, n=1, cutoff=0.0)[0]
            raise BadParameter(f"expected one of {', '.join(names)}, found {text!r}; did you mean {nearest}?")
        return text

    return parse


def _target_modules(text: str) -> str:
    if re.fullmatch("[a-z]+(-[a-z]+)+", text):
        return _one_of(ROLE_NAMES)(text)
    try:
        re.compile(text)
    except re.error as error:
        raise BadParameter(f"{text!r} is neither a role nor a regular expression: {error}") from error
    return text


def _picture(text: str) -> Path:
    if Path(text).suffix not in PICTURE_SUFFIXES:
        raise BadParameter(f"expected a file that ends in one of {', '.join(PICTURE_SUFFIXES)}, found {text!r}")
    return Path(text)


def _choice(names: Collection[str], meaning: str) -> OptionInfo:
    return Option(parser=_one_of(names), metavar="|".join(names), help=meaning)


def _limit(parse: Callable[[str], int], units: Collection[str], example: str, meaning: str) -> OptionInfo:
    def read(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise BadParameter(str(error)) from error

    return Option(parser=read, metavar=example, help=f"Limit on {meaning}, in {', '.join(units)}.")


def _count(meaning: str) -> OptionInfo:
    return Option(min=1, help=meaning)


def _path(metavar: str, meaning: str) -> OptionInfo:
    return Option(metavar=metavar, help=meaning)


_MODEL = "The folder of an adapter or of a saved model, or the id of an adapter on the Hub."
_METHODS = f"One or several methods: {', '.join(METHOD_NAMES)}."
_TARGETS = f"The layers to adapt: {', '.join(ROLE_NAMES)}, or a regular expression"

Base = Annotated[str, Option(help="The base model: the folder of a saved model, or the id of a timm model on the Hub.")]
Backbone = Annotated[str, Option(help="A timm model name, or the folder of a saved model.")]
NumClasses = Annotated[int | None, _count("Number of classes; by default that of the backbone.")]
BatchSize = Annotated[int, _count("Images per step.")]
ImageSize = Annotated[int, _count("Height and width in pixels.")]
Methods = Annotated[list[str], Option(parser=_one_of(METHOD_NAMES), metavar="METHOD ...", help=_METHODS)]
LoraRanks = Annotated[list[int], Option(min=1, metavar="RANK ...", help="One or several ranks of the adapters.")]
Optimizer = Annotated[str, _choice(OPTIMIZER_NAMES, "The optimizer. Method galore uses its GaLore variant.")]
Json = Annotated[
    Path | None, Option(dir_okay=False, metavar="FILE", help="Write the result as JSON. If FILE is -, print only JSON.")
]
Picture = Annotated[Path | None, Option(parser=_picture, metavar="FILE", help="Save a figure (.png, .svg or .pdf).")]

app = typer.Typer(
    add_completion=False,
    help="Parameter-efficient fine-tuning for edge CNNs.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    """Run `peft-edge` with `arguments`, by default those of the command line. Raise SystemExit only after a failure."""
    try:
        app(arguments, prog_name="peft-edge")
    except SystemExit as stop:
        if stop.code:
            raise


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"peft-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_print_version, is_eager=True, help="Show version.")] = False,
) -> None:
    pass


@app.command(cls=Command)
def profile(
    backbone: Backbone,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    method: Methods = ["full", "lora"],  # noqa: B006
    lora_rank: LoraRanks = [4],  # noqa: B006
    target_modules: Annotated[
        str | None, Option(parser=_target_modules, metavar="ROLE|REGEX", help=f"{_TARGETS}; by default the method's.")
    ] = None,
    norm: Annotated[str, _choice(NORMS, "BatchNorm mode, as in the key norm of train.py.")] = "stats",
    optimizer: Optimizer = "adamw",
    accounting: Annotated[Accounting, _choice(get_args(Accounting), "How to count FLOPs.")] = "exact",
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Print the FLOPs and memory of a training step, without training.

    Prints a row for each method and LoRA rank. The steps run on tensors without values, so the command takes seconds
    and needs memory only for the weights.
    """
    from peft_edge.backbones import load_backbone
    from peft_edge.profiling.analysis import compare_methods
    from peft_edge.profiling.figures import save_cost_figure
    from peft_edge.profiling.tables import cost_table

    model = load_backbone(backbone, num_classes)
    adapter = {"norm": norm} | ({"target_modules": target_modules} if target_modules else {})
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    costs = compare_methods(model, method, lora_ranks=lora_rank, adapter=adapter, accounting=accounting, **options)
    setting: dict[str, object] = {"num_classes": model.num_classes, "backbone": backbone}
    setting |= {"target_modules": target_modules, "norm": norm, **options, "accounting": accounting}
    setting["costs"] = {name: cost.model_dump() for name, cost in costs.items()}
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    _show(dumps(setting, indent=2) + "\n", f"One training step of {step}\n\n{cost_table(costs)}", json)
    if picture is not None:
        save_cost_figure(costs, picture, title=step)


@app.command(cls=Command)
def plan(
    backbone: Backbone,
    num_classes: NumClasses = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    memory: Annotated[int | None, _limit(parse_bytes, BYTES, "256MiB", "the memory of tensors in a step")] = None,
    flops: Annotated[int | None, _limit(parse_flops, FLOPS, "3GFLOP", "the FLOPs of a step")] = None,
    adapter_bytes: Annotated[int | None, _limit(parse_bytes, BYTES, "200KiB", "the size of the saved update")] = None,
    method: Methods = [*METHODS_TO_PLAN],  # noqa: B006
    target_modules: Annotated[
        list[str], Option(parser=_target_modules, metavar="ROLE|REGEX ...", help=f"{_TARGETS}; one or several.")
    ] = [*PLACEMENTS],  # noqa: B006
    lora_rank: LoraRanks = [*LORA_RANKS],  # noqa: B006
    optimizer: Optimizer = "adamw",
    records: Annotated[
        Path | None, _path("FOLDER", "Records of runs. Combinations with runs come first, most accurate first.")
    ] = None,
) -> None:
    """List the methods that fit a budget of memory, FLOPs and update size.

    Prints the combinations of method, target modules and LoRA rank whose training step fits, each with the mildest lean
    setting that is needed. Then prints combinations that do not fit, each with the limits that the step exceeds. If a
    rank does not fit, higher ranks are left out. The steps run on tensors without values.
    """
    from peft_edge.backbones import load_backbone

    budget = Budget(memory_bytes=memory, flops=flops, adapter_bytes=adapter_bytes)
    model = load_backbone(backbone, num_classes)
    options: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "optimizer": optimizer}
    found = find_plan(
        model, budget, methods=method, target_modules=target_modules, lora_ranks=lora_rank, records=records, **options
    )
    step = f"{backbone}, {model.num_classes} classes, batch {batch_size}, {image_size} px, {optimizer}"
    print(f"Training steps of {step}; {budget}\n\n{plan_table(found)}")


@app.command(cls=Command)
def bench(
    backbone: Backbone,
    num_classes: Annotated[int, _count("Number of classes.")] = 10,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 224,
    methods: Annotated[
        list[str], Option(parser=_one_of(CONTENDERS), metavar="METHOD ...", help="Methods to compare with full.")
    ] = CONTENDERS,
    lora_rank: Annotated[int, _count("Rank of all adapters.")] = 4,
    rounds: Annotated[int, _count("Timed steps of each method.")] = 7,
    threads: Annotated[int, _count("CPU threads.")] = 1,
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Measure training steps of peft-edge, PEFT, LyCORIS and loralib on this machine.

    Libraries that are not installed are left out. Prints memory, FLOPs, and the ratio of the step time to the step time
    of full fine-tuning. The methods take turns step by step. The command takes minutes; run no other program meanwhile.
    """
    from peft_edge.bench import bench_table, run_bench, save_bench_figure

    record = run_bench(
        backbone,
        methods,
        num_classes=num_classes,
        batch_size=batch_size,
        image_size=image_size,
        lora_rank=lora_rank,
        rounds=rounds,
        threads=threads,
    )
    _show(record.to_json(), bench_table(record), json)
    if picture is not None:
        save_bench_figure(record, picture)


def _show(json_text: str, table: str, file: Path | None) -> None:
    """Print `table`, and write `json_text` to `file` unless it is None. If `file` is `-`, print only `json_text`."""
    if file == Path("-"):
        sys.stdout.write(json_text)
        return
    print(table)
    if file is not None and file.exists() and not file.is_file():
        # `atomic_write` would replace a device or a pipe, such as /dev/stdout, by a file.
        file.write_text(json_text, encoding="utf-8")
    elif file is not None:
        with atomic_write(file.resolve()) as unfinished:
            unfinished.write_text(json_text, encoding="utf-8")


@app.command(cls=Command)
def study(
    grid: Annotated[Path, _path("FILE", "A YAML file, such as configs/study/methods.yaml.")],
    output_dir: Annotated[Path, _path("FOLDER", "The parent of the folders of all runs.")],
    jobs: Annotated[int, _count("Parallel processes, each on one CPU core.")] = 1,
    results: Annotated[Path | None, _path("FOLDER", "Folder of the records; by default OUTPUT_DIR/results.")] = None,
) -> None:
    """Run a grid of training runs or cost analyses, and print a table.

    Runs every combination in the grid. Finished runs are not repeated, and a failed run does not stop the other runs.
    To share a grid among machines, start this command on each machine with the same output folder.
    """
    from peft_edge.study import read_grid, run_grid, study_table

    planned = read_grid(grid, output_dir)
    run_grid(planned, processes=jobs, results=results or output_dir / "results")
    print(study_table(planned))
    if failed := [job for job in planned if not job.is_finished]:
        raise ValueError(
            f"{len(failed)} of {len(planned)} failed: {failed[0].log} says why the first run failed. Run the same "
            "command again to repeat the failed runs"
        )


@app.command(cls=Command)
def report(
    records: Annotated[Path, _path("FOLDER", "Records of runs, such as reports/results.")],
    out: Annotated[Path, _path("FOLDER", "The output folder, such as reports.")],
    bench: Annotated[Path | None, _path("FOLDER", "Records of peft-edge bench, for a section on step time.")] = None,
) -> None:
    """Write a page, figures and a data file from records.

    Writes README.md, figures (PNG and SVG) and data.csv. The same records give byte-identical files. Other files in the
    output folder are unchanged.
    """
    from peft_edge.report import write_report

    for file in write_report(records, out, bench=bench):
        print(file)


@app.command(cls=Command)
def export(
    adapter: Annotated[str, Argument(help=_MODEL)],
    out: Annotated[Path, _path("FILE", "The output file, with the ending of the format: .onnx, .pt2 or .pte.")],
    format: Annotated[str, _choice(EXPORT_FORMATS, "The file format.")] = "onnx",
    image_size: Annotated[
        int | None, _count("Height and width in pixels. By default as in the run, or without a record as in timm.")
    ] = None,
    batch_size: Annotated[int | None, _count("Images per call; by default any number, or 1 for ExecuTorch.")] = None,
    quantize: Annotated[str | None, _choice(["int8"], "Quantize the ONNX model; needs --calibration.")] = None,
    calibration: Annotated[
        str | None,
        _path(
            "FOLDER",
            "A folder with one subfolder of images per class, or digits, or shapes. Its training images calibrate the "
            "quantization. The file is compared with the model on its test images, by default on those of digits.",
        ),
    ] = None,
) -> None:
    """Export an adapted model for ONNX Runtime, torch.export or ExecuTorch.

    Merges the adapter, fuses BatchNorm into the convolutions, and compares the outputs of the file with the outputs of
    the PyTorch model. If the outputs of the exported floating-point network differ too much, no file is written.
    """
    from peft_edge.export.exporter import export_model
    from peft_edge.export.verification import comparison_table, read_images

    if quantize and calibration is None:
        raise ValueError("--quantize needs images for calibration: pass --calibration FOLDER")
    model = _load_model(adapter)
    run = _run_config(Path(adapter))
    size = image_size or (run["data"]["image_size"] if run else None)
    images = read_images(calibration or "digits", model, image_size=size, run=run)
    compared = export_model(
        model,
        out,
        format=format,
        images=images.comparison,
        # Without the record of the run, the test images may include images that the model was trained on.
        labels=images.labels if run else None,
        batch_size=batch_size,
        calibration=images.calibration if quantize else None,
    )
    print(f"{out}, compared with {adapter} on {len(images.comparison)} images")
    print(comparison_table(compared))
    if run is None and images.labels is not None:
        print(f"No accuracies: {adapter} has no record.json of its run, which tells what images it was trained on")


def _run_config(folder: Path) -> JsonObject | None:
    """Return the configuration of the run that wrote `folder`, or None if there is no record.

    `record.json` is in `folder` if it was pushed to the Hub and downloaded, and otherwise in the parent of `folder`.
    """
    for place in (folder, folder.absolute().parent) if folder.is_dir() else ():
        if (record := read_record(place / "record.json", Record)) is not None:
            return record.run_info.train_config
    return None


@app.command(cls=Command)
def diff(
    base: Base,
    adapter: Annotated[str, Option(help=_MODEL)],
    out: Annotated[Path, _path("FILE", "The output file (.safetensors).")],
    allow_other_base: Annotated[
        bool, Option("--allow-other-base", help="Accept a base whose weights differ from those in training.")
    ] = False,
) -> None:
    """Write only the weights that an adapter changes.

    Writes the tensors of the merged model that differ from the base. On a device that has the base, `peft-edge apply`
    rebuilds the merged model from this file.
    """
    from peft_edge.export.differences import write_diff

    model = _load_base(base)
    changed = write_diff(model, _load_model(adapter, _load_base(base), allow_other_base=allow_other_base), out)
    print(f"{out}: {out.stat().st_size:,} bytes, {len(changed)} of {len(model.state_dict())} tensors")


@app.command(cls=Command)
def apply(
    base: Base,
    diff: Annotated[Path, _path("FILE", "The file that peft-edge diff wrote.")],
    out: Annotated[Path, _path("FOLDER", "The output folder; may be the folder of the base.")],
) -> None:
    """Rebuild the merged model from its base and a diff.

    The result is bit-identical to the merged model. If the diff was written for another base, nothing is written.
    """
    from peft_edge.export.differences import apply_diff, save_result

    save_result(apply_diff(_load_base(base), diff), out)
    print(f"{out}: the model of {diff}")


def _load_model(name: str, base: nn.Module | None = None, *, allow_other_base: bool = False) -> nn.Module:
    from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

    from peft_edge.backbones import load_backbone
    from peft_edge.backbones.loading import CONFIG_NAME
    from peft_edge.hub import load_pretrained

    folder = Path(name)
    if (folder / CONFIG_NAME).exists() and not (folder / ADAPTER_CONFIG_NAME).exists():
        return load_backbone(name)
    return load_pretrained(name, base=base, allow_other_base=allow_other_base)


def _load_base(name: str) -> nn.Module:
    from peft_edge.backbones import load_backbone

    return load_backbone(name, pretrained=not Path(name).is_dir())
