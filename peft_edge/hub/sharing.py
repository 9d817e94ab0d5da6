"""A record without what is only true, or only of concern, on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft_edge.records import Record


def shareable(record: Record) -> Record:
    """Returns a copy of a record in which local paths are cut down to their last part."""
    return Record.from_json(json.dumps(_cut(json.loads(record.to_json()))))


def _cut(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {_cut(name): _cut(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_cut(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and _is_local(value, key) else value


def _is_local(text: str, key: str) -> bool:
    # "owner/name" may be a data set of the Hub, or a folder here.
    return key in ("output_dir", "cache_dir") or bool(re.match(r"[/~.\\]|[A-Za-z]:[/\\]", text)) or _exists(text)


def _exists(text: str) -> bool:
    return "/" in text and len(text) < 1000 and Path(text).exists()
