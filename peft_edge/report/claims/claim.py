"""The form of every claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

AGREED, IN_PART, NOT_AGREED, NOT_MEASURED = "Agreed", "In part", "Not agreed", "Not measured"

Picture = Callable[[Path], None]
"""Draws a figure to files with this name and the endings of `ENDINGS`."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A section of the page."""

    title: str
    """What it is about."""

    source: str
    """What the source study says."""

    measured: str
    """How it was measured here."""

    found: str
    """One sentence: agreement or disagreement, with the figure."""

    more: Sequence[str] = ()
    """Paragraphs, tables and figures."""

    pictures: Mapping[str, Picture] = field(default_factory=dict)
    """The figures by their names in `figures`."""

    @property
    def section(self) -> str:
        """The section in Markdown."""
        return "\n\n".join(
            [
                f"## {self.title}",
                f"**What the source says.** {self.source}",
                f"**How it was measured.** {self.measured}",
                f"**What was found.** {self.found}",
                *self.more,
            ]
        )


def not_measured(what: str, grid: str) -> str:
    """Says in one sentence what is missing and how to make it.

    Args:
        what: The records that are missing.
        grid: The grid file with which they are made.
    """
    command = f"peft-edge study --grid {grid} --output-dir runs"
    return f"{NOT_MEASURED}: there is no record of {what}; `{command}` makes them, in `runs/results`."


def verdict(agreeing: int, of: int) -> str:
    """Agreed if all agree, not agreed if none does."""
    return AGREED if agreeing == of else IN_PART if agreeing else NOT_AGREED
