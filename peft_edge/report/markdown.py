"""Numbers, links and tables in Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from peft_edge.report.stats import Difference

NONE = "-"
"""What stands where nothing was measured."""

_MARK = re.compile(r"\[@([^\]]+)\]")


def fixed(value: float | None, digits: int) -> str:
    """A number with that many digits after the point; zero has no sign."""
    return NONE if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"


def percent(share: float | None) -> str:
    """A share in per cent, without the sign."""
    return fixed(None if share is None else 100 * share, 1)


def spread(shares: Sequence[float], runs: int | None = None) -> str:
    """Mean and standard deviation in per cent, and how many there are if they are not as many as `runs`."""
    if not shares:
        return NONE
    deviation = f" ± {percent(statistics.stdev(shares))}" if len(shares) > 1 else ""
    return f"{percent(statistics.fmean(shares))}{deviation}" + (f" ({len(shares)})" if len(shares) != runs else "")


def difference(found: Difference | None) -> str:
    """A paired difference of shares in points, with its standard error; bold where it is clear."""
    if found is None:
        return NONE
    text = f"{100 * found.mean:+.1f}" + ("" if found.error is None else f" ± {percent(found.error)}")
    return f"**{text}**" if found.is_clear else text


def short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return fixed(value, max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 2)


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def interval(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def links(files: Iterable[str]) -> str:
    """Marks for files, each once, which `numbered` makes links of."""
    return " ".join(f"[@{file}]" for file in dict.fromkeys(files))


def numbered(text: str) -> str:
    """Gives every file that is marked in a page one number, with which it is linked wherever it is named."""
    numbers: dict[str, int] = {}
    text = _MARK.sub(lambda mark: f"[{numbers.setdefault(mark[1], len(numbers) + 1)}]", text)
    return "\n".join([text, *(f"[{number}]: {quote(file, safe='/=,')}" for file, number in numbers.items()), ""])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table.

    Args:
        head: The titles of the columns.
        rows: Of equally many cells.
        words: How many columns, from the left, hold words; the others, but for the last one, hold numbers.
    """
    marks = ["---" if column < words or column == len(head) - 1 else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *rows])


def picture(name: str, text: str) -> str:
    """A figure, which links to its form that can be enlarged.

    Args:
        name: Of the file in `figures`, without its ending.
        text: What it shows.
    """
    return f"[![{text}](figures/{name}.png)](figures/{name}.svg)\n\n*{text}*"
