"""Regular expressions that came with an adapter, in the linear time that Python's own matching does not promise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from peft_edge.roles import ROLES

# What is no pattern although it is one text.
_WORDS = {*ROLES, "all-linear", DUMMY_TARGET_MODULES}


def resolve_patterns(config: PeftConfig, names: Sequence[str]) -> None:
    """Replaces the regular expressions of a configuration by the names of the modules that they match.

    Some patterns take Python's matching, which PEFT applies, longer than anybody waits ("catastrophic backtracking").
    Here they are matched by RE2 (Cox 2010, "Regular Expression Matching in the Wild"), in time linear in the name.

    Args:
        config: Changed in place.
        names: Of the modules of the network.

    Raises:
        ValueError: A pattern is none, or needs to look ahead or back, which takes more than linear time; or there are
            more targets than modules.
    """
    for field in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value: Any = getattr(config, field, None)
        if isinstance(value, str) and value not in _WORDS:
            setattr(config, field, exact_pattern(_matched(field, value, names)))
        elif isinstance(value, (list, set, dict)) and len(value) > len(names):
            raise ValueError(f"{field}: expected at most the {len(names)} modules of the network, found {len(value)}")
        elif isinstance(value, dict):
            # PEFT takes the first of them that matches the end of a name; with a circumflex, the whole name.
            exact = {
                rf"^{re.escape(name)}": number
                for pattern, number in reversed(value.items())
                for name in _matched(field, rf"(?:.*\.)?(?:{pattern})", names)
            }
            setattr(config, field, exact)
    layers = getattr(config, "layers_pattern", None) or []
    for name in [layers] if isinstance(layers, str) else layers:
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"layers_pattern: expected names of modules, found {name[:80]!r}")


def exact_pattern(names: Iterable[str]) -> str:
    """Returns the regular expression that matches these names only."""
    return "|".join(map(re.escape, sorted(names)))


def is_linear(pattern: str) -> bool:
    """Whether RE2 takes it."""
    try:
        _matched("", pattern, [""])
    except ValueError:
        return False
    return True


def _matched(field: str, pattern: str, names: Sequence[str]) -> list[str]:
    # Not with the package, whose import is to be quick.
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        found = pc.match_substring_regex(pa.array(names, pa.string()), rf"\A(?:{pattern})\z")
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{field}: {pattern[:80]!r} is no regular expression that matches in linear time: {str(error)[:80]}"
        ) from error
    return [name for name, is_match in zip(names, found.to_pylist(), strict=True) if is_match]
