"""Helpers of all commands: parse arguments, declare options, and load models.

Arguments are checked before torch is imported, so that mistakes are reported quickly. Modules that need torch are
therefore imported inside the functions of the commands. Some constants in this folder repeat names from modules that
need torch, and a test checks that the names agree.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import BadParameter, Option
from typer.core import TyperCommand
from typer.models import OptionInfo

from peft_edge.config.schema import METHOD_NAMES, OPTIMIZER_NAMES, ROLE_NAMES
from peft_edge.files import atomic_write
from peft_edge.names import did_you_mean

if TYPE_CHECKING:
    from torch import nn

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
STEP_OPTIMIZERS = ("sgd", "adamw")  # the optimizers of an exported training step


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
        """Run the command. Exit with code 2 after a ValueError, OSError or ImportError, and with 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("stopped: finished results are kept", file=sys.stderr)
            raise typer.Exit(130) from error


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Return a parser that accepts only `names`. For other texts, the parser raises BadParameter.

    The error message suggests a similar name, if there is one.
    """

    def parse(text: str) -> str:
        if text not in names:
            hint = did_you_mean(text, names)
            raise BadParameter(f"expected one of {', '.join(names)}, found {text!r}{hint}")
        return text

    return parse


def role_or_regex(text: str) -> str:
    """Return `text` if it is a layer role or a regular expression. Otherwise raise BadParameter.

    A role is the name of a group of layers. `ROLE_NAMES` contains all roles. A text of lower-case words joined by
    hyphens, such as `last-stage`, must be a role.
    """
    if re.fullmatch("[a-z]+(-[a-z]+)+", text):
        return one_of(ROLE_NAMES)(text)
    try:
        re.compile(text)
    except re.error as error:
        raise BadParameter(f"{text!r} is neither a role nor a regular expression: {error}") from error
    return text


def picture_file(text: str) -> Path:
    """Return `text` as a path. Raise BadParameter unless it ends in one of `PICTURE_SUFFIXES`."""
    if Path(text).suffix not in PICTURE_SUFFIXES:
        raise BadParameter(f"expected a file that ends in one of {', '.join(PICTURE_SUFFIXES)}, found {text!r}")
    return Path(text)


def choice(names: Collection[str], meaning: str) -> OptionInfo:
    """Declare an option that accepts one of `names`."""
    return Option(parser=one_of(names), metavar="|".join(names), help=meaning)


def limit(parse: Callable[[str], int], units: Collection[str], example: str, meaning: str) -> OptionInfo:
    """Declare an option for a number with a unit. `parse` converts the text of the option, or raises a ValueError."""

    def read(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise BadParameter(str(error)) from error

    return Option(parser=read, metavar=example, help=f"{meaning}, in {', '.join(units)}.")


def count(meaning: str) -> OptionInfo:
    """Declare an option for a positive integer."""
    return Option(min=1, help=meaning)


def path(metavar: str, meaning: str) -> OptionInfo:
    """Declare an option that accepts a path."""
    return Option(metavar=metavar, help=meaning)


MODEL_HELP = "The folder of an adapter or of a saved model, or the id of an adapter on the Hub."
METHODS_HELP = f"One or several methods: {', '.join(METHOD_NAMES)}."
TARGETS_HELP = f"The layers to adapt: {', '.join(ROLE_NAMES)}, or a regular expression"

BASE_HELP = "The base model: the folder of a saved model, or the id of a timm model on the Hub."
Base = Annotated[str, Option(help=BASE_HELP)]
Backbone = Annotated[str, Option(help="The name of a timm model, or the folder of a saved model.")]
NumClasses = Annotated[int | None, count("Number of classes; by default that of the backbone.")]
BatchSize = Annotated[int, count("Images per step.")]
ImageSize = Annotated[int, count("Height and width in pixels.")]
Methods = Annotated[list[str], Option(parser=one_of(METHOD_NAMES), metavar="METHOD ...", help=METHODS_HELP)]
LoraRanks = Annotated[list[int], Option(min=1, metavar="RANK ...", help="One or several ranks of the adapters.")]
Optimizer = Annotated[str, choice(OPTIMIZER_NAMES, "The optimizer. Method galore uses its GaLore variant.")]
Json = Annotated[
    Path | None, Option(dir_okay=False, metavar="FILE", help="Write the result as JSON. If FILE is -, print only JSON.")
]
Picture = Annotated[
    Path | None, Option(parser=picture_file, metavar="FILE", help="Save a figure (.png, .svg or .pdf).")
]


def show(json_text: str, table: str, file: Path | None) -> None:
    """Print `table`, and write `json_text` to `file` if `file` is given. If `file` is `-`, print only `json_text`."""
    if file == Path("-"):
        sys.stdout.write(json_text)
        return
    print(table)
    if file is not None and file.exists() and not file.is_file():
        # `file` is a device or a pipe, such as /dev/stdout. `atomic_write` would replace it by an ordinary file.
        file.write_text(json_text, encoding="utf-8")
    elif file is not None:
        with atomic_write(file.resolve()) as unfinished:
            unfinished.write_text(json_text, encoding="utf-8")


def load_any_model(name: str, base: nn.Module | None = None, *, allow_other_base: bool = False) -> nn.Module:
    """Load a saved model from a folder, or an adapter from a folder or the Hub.

    `base` and `allow_other_base` apply only to adapters; see `load_pretrained`.
    """
    from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

    from peft_edge.backbones import load_backbone
    from peft_edge.backbones.loading import CONFIG_NAME
    from peft_edge.hub import load_pretrained

    folder = Path(name)
    if (folder / CONFIG_NAME).exists() and not (folder / ADAPTER_CONFIG_NAME).exists():
        return load_backbone(name)
    return load_pretrained(name, base=base, allow_other_base=allow_other_base)


def load_base_model(name: str) -> nn.Module:
    """Load the saved model in the folder `name`. If `name` is not a folder, load the pretrained timm model `name`."""
    from peft_edge.backbones import load_backbone

    return load_backbone(name, pretrained=not Path(name).is_dir())
