"""The `peft-edge` command."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from peft_edge import __version__
from peft_edge.allocator import use_huge_pages
from peft_edge.cli.costs import bench, plan, profile
from peft_edge.cli.fleet import merge_adapters_of_fleet
from peft_edge.cli.models import apply, diff, export, import_, load_states
from peft_edge.cli.options import Command
from peft_edge.cli.runs import report, study

app = typer.Typer(
    add_completion=False,
    help="Parameter-efficient fine-tuning for edge CNNs.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command in `arguments`, by default in `sys.argv[1:]`. Raise SystemExit only if the command fails."""
    use_huge_pages()
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


app.command("import", cls=Command)(import_)
for command in (profile, plan, bench, study, report, export, diff, apply):
    app.command(cls=Command)(command)
app.command("merge-adapters", cls=Command)(merge_adapters_of_fleet)
app.command("import-state", cls=Command)(load_states)
