"""The configuration of an adapter from a file that nobody vouches for."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_edge.hub.reading import read_json

# Other tuners of PEFT's read further files, or compile code.
_TYPES = ("CONV_LORA", "CONV_ADAPTER", "LORA", "LOHA", "LOKR")

# Drawn, or the exact decomposition of the backbone's weight. Others take as long as the file says, or need data.
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")


def read_configuration(path: Path) -> PeftConfig:
    """Reads an `adapter_config.json`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none, or has a key or a value that PEFT's class for it does not know.
    """
    try:
        found = read_json(path)
        peft_type = found["peft_type"]
        found["base_model_name_or_path"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {path.parent} holds no adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the configuration of an adapter, found something else ({error!r})"
        ) from error
    if peft_type not in _TYPES:
        raise ValueError(
            f"{path}: expected a peft_type of {', '.join(_TYPES)}, found {peft_type!r:.80}. PEFT's own "
            "PeftModel.from_pretrained loads others, if you trust where they come from"
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    _check_values(path, kind, found)
    try:
        return kind.from_peft_type(**found)
    except Exception as error:  # whatever PEFT makes of values that its own hints allow
        raise ValueError(f"{path}: {type(error).__name__}: {error!s:.500}") from error


def _check_values(path: Path, kind: type[PeftConfig], found: dict[str, Any]) -> None:
    # Not with the package, whose import is to be quick.
    from pydantic import TypeAdapter, ValidationError

    # It names a module that PEFT would import.
    if found.get("megatron_config") is not None:
        raise ValueError(f"{path}: megatron_config: expected null, as for every convolutional network")
    initial = found.get("init_lora_weights", True)
    if initial not in _INITIAL_WEIGHTS:
        raise ValueError(
            f"{path}: init_lora_weights: expected one of {_INITIAL_WEIGHTS}, found {initial!r:.80}: save it again with "
            "path_initial_model_for_weight_conversion"
        )
    known, hints = {entry.name for entry in fields(kind)}, get_type_hints(kind)
    for key, value in found.items():
        if key not in known:
            nearest = difflib.get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {nearest[0]}? Or was" if nearest else "was"
            raise ValueError(f"{path}: unknown key {key[:80]!r}; {hint} it saved by a newer PEFT? Then upgrade")
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{path}: {key}: {error.errors()[0]['msg']}, found {value!r:.80}") from error
