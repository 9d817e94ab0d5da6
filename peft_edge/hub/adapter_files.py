"""Files that came from elsewhere: read within limits, and refused before anything is built from them.

The configuration of an adapter from a file that nobody vouches for.

Regular expressions that came with an adapter, in the linear time that Python's own matching does not promise.

Writes an adapter to a folder, with the names of its classes and a card.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError, safe_open

from peft_edge.backbones import class_names
from peft_edge.files import atomic_write
from peft_edge.hub.card import CARD_NAME, Subject, adapter_card
from peft_edge.roles import ROLES
from peft_edge.tuners.injection import iter_target_modules

JSON_LIMIT = 2**20
"""Bytes of a JSON file. The configuration of an adapter takes a few thousand."""

HEADER_LIMIT = 2**23
"""Bytes of the header of a safetensors file. It takes about a hundred for each tensor."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and the type of every tensor, by its name."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def read_json(path: Path) -> Any:
    """Reads a JSON file of at most `JSON_LIMIT` bytes, in which no key stands twice and every number is finite.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise ValueError(f"it has more than the {JSON_LIMIT:,} bytes that are read of such a file")
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def read_layout(path: Path) -> Layout:
    """Reads names, shapes and types from the header of a safetensors file; the tensors are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds tensors of a type that no network here has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    problem: Exception | str = f"its header would take {header:,} bytes"
    if header <= min(HEADER_LIMIT, size):
        try:
            with safe_open(path, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
                dtypes = {name: part.get_dtype() for name, part in slices.items()}
                if not (unknown := set(dtypes.values()) - _DTYPES.keys()):
                    return {name: (tuple(part.get_shape()), _DTYPES[dtypes[name]]) for name, part in slices.items()}
        except SafetensorError as error:
            problem = error
        else:
            raise ValueError(f"{path}: expected tensors of the types {', '.join(_DTYPES)}, found {sorted(unknown)}")
    raise ValueError(
        f"{path} is truncated or damaged: {size} bytes are no whole safetensors file ({problem}). Copy it again from "
        "where it was made"
    ) from (problem if isinstance(problem, Exception) else None)


def check_finite(path: Path) -> None:
    """Checks that every value in a safetensors file is finite.

    Raises:
        ValueError: One is not; the message names the tensor.
    """
    for name, tensor in safetensors.torch.load_file(path).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite. Copy it again from where it was made")


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


LABELS_NAME = "label_names.json"

SOURCE_NAME = "source_model"
"""The subfolder with the backbone, where that cannot be had elsewhere."""

BACKBONE_FILES = ("config.json", "model.safetensors")


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter, the names of its classes, and a card with the lines that load it; replaces what is there.

    Args:
        model: The adapted model; its active adapter is saved.
        folder: Where to. It appears whole or not at all.

    Raises:
        ValueError: There are not as many class names as classes.
        OSError: The folder cannot be written.
    """
    with atomic_write(Path(folder)) as unfinished:
        write_adapter(model, unfinished, adapter_card(Subject.of(model)))


def write_adapter(model: PeftModel, folder: Path, card: ModelCard) -> None:
    """Writes what `save_adapter` does, with a card of the caller's, to which PEFT adds its version."""
    names = class_names(model)
    folder.mkdir(exist_ok=True)
    card.save(folder / CARD_NAME)
    # Without the argument, PEFT asks the Hub how large the base model's vocabulary is.
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter], save_embedding_layers=False)
    # PEFT puts an adapter that is not called "default" into a folder of its name.
    for file in list(folder.glob(f"{model.active_adapter}/*")):
        file.rename(folder / file.name)
    (folder / CARD_NAME).write_text(_with_own_tags(card, folder), encoding="utf-8")
    if names is not None:
        (folder / LABELS_NAME).write_text(json.dumps(names), encoding="utf-8")
    _make_loadable(model, folder / CONFIG_NAME)


def _with_own_tags(card: ModelCard, folder: Path) -> str:
    """PEFT replaces the tags by its own, one of which is the path of the backbone on this machine."""
    extended: Any = ModelCard.load(folder / CARD_NAME)
    extended.data.tags = card.data.to_dict()["tags"]
    return str(extended)


def _make_loadable(model: PeftModel, path: Path) -> None:
    """Names the modules that a pattern matches which `load_pretrained` refuses, since it trusts no file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    names = [site.name for site in iter_target_modules(model.get_base_model())]
    for field in ("target_modules", "exclude_modules"):
        pattern = config.get(field)
        if isinstance(pattern, str) and not is_linear(pattern):
            config[field] = exact_pattern(name for name in names if re.fullmatch(pattern, name))
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
