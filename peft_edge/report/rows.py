"""What runs and analyses have in common as rows: the names that tell them apart, their order and their groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from peft_edge.methods import METHODS

Row = TypeVar("Row")

KINDS = ("standard", "depthwise", "transformer")
"""The kinds of networks, in the order of tables."""


def method_order(name: str) -> int:
    """The place of a method in tables: that in `METHODS`, and after them what is not there."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Returns the rows by a key, in the order in which they come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns what is in a block and the blocks inside of it, by dotted keys."""
    found = {}
    for key, value in block.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def disambiguate_labels(keys: Sequence[tuple[Any, ...]], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a label for each row: the last part of its key, and the settings in which rows of that key differ.

    Args:
        keys: Of each row, what it belongs to, and at last its name.
        settings: Of each row, what it may differ in.
    """
    labels = [key[-1] for key in keys]
    for members in grouped(range(len(keys)), lambda number: keys[number]).values():
        same = [settings[number] for number in members]
        names = sorted({name for setting in same for name in setting})
        varied = [name for name in names if len({json.dumps(setting.get(name)) for setting in same}) > 1]
        for number in members:
            labels[number] += "".join(f", {name}={settings[number].get(name)}" for name in varied)
    return labels
