"""Write the files of an adapter, and read files that may be damaged or hostile.

The functions that read files check sizes before they allocate memory, reject keys and values that PEFT does not define,
and match regular expressions in linear time.
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
from typing import get_type_hints

import safetensors.torch
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config

from peft_edge.backbones import class_names
from peft_edge.files import atomic_write
from peft_edge.hub.card import CARD_NAME, CardSubject, adapter_card
from peft_edge.roles import ROLES
from peft_edge.tuners.injection import base_fingerprint, iter_target_modules

LABELS_NAME = "label_names.json"
PREPROCESSING_NAME = "preprocessing.json"  # timm's data configuration: input size, crop, interpolation, mean and std
BASE_NAME = "base_fingerprint.json"  # contains a hash of the base weights that the adapter was trained on
SOURCE_NAME = "source_model"  # subfolder with the backbone, unless the backbone is a timm model on the Hub
BACKBONE_FILES = ("config.json", "model.safetensors")
JSON_LIMIT = 2**20  # bytes; an adapter's configuration takes a few thousand bytes
HEADER_LIMIT = 2**23  # bytes; a safetensors header takes about a hundred bytes per tensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and dtype of each tensor in a file. The keys are the names of the tensors."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
# PEFT's other tuners are not supported, because they may read further files or compile code.
_PEFT_TYPES = ("CONV_LORA", "CONV_ADAPTER", "LORA", "LOHA", "LOKR")
# The accepted values of `init_lora_weights`. The first four are initialisations with random values. "pissa" and "olora"
# decompose the weight of the backbone exactly. Other initialisations need data, or have a number of iterations, which a
# hostile file could make arbitrarily large.
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
# Values of `target_modules` that are keywords, not regular expressions.
_KEYWORDS = {*ROLES, "all-linear", DUMMY_TARGET_MODULES}


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save the active adapter, the class names, the preprocessing and a model card to `folder`.

    The preprocessing is timm's data configuration of the model. All files are first written to a temporary folder,
    which then replaces `folder`. Fingerprints (hashes) of the base weights and of frozen BatchNorm statistics are also
    saved, so that `load_pretrained` can reject a base model with other values. Fingerprints are left out if the adapter
    is merged, or if the initialisation of the adapter may have changed base weights, as PiSSA does.

    Raises:
        ValueError: If the number of class names differs from the number of classes.
        OSError: If the folder cannot be written.
    """
    with atomic_write(Path(folder)) as unfinished:
        write_adapter(model, unfinished, adapter_card(CardSubject.from_model(model)))


def write_adapter(model: PeftModel, folder: Path, card: ModelCard, *, base_name: str | None = None) -> None:
    """Write all files of an adapter (see `save_adapter`) to `folder`, with `card` as the model card.

    `base_name`, if given, replaces `base_model_name_or_path` in the configuration.
    """
    names = class_names(model)
    folder.mkdir(exist_ok=True)
    # By default (`save_embedding_layers="auto"`), PEFT would request the base model's vocabulary size from the Hub.
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter], save_embedding_layers=False)
    # PEFT writes an adapter that is not named "default" into a subfolder.
    for file in list(folder.glob(f"{model.active_adapter}/*")):
        file.rename(folder / file.name)
    card.save(folder / CARD_NAME)  # instead of PEFT's card, whose tags include the local path of the backbone
    if names is not None:
        (folder / LABELS_NAME).write_text(json.dumps(names), encoding="utf-8")
    if hasattr(model, "pretrained_cfg") and (data_config := resolve_model_data_config(model))["input_size"][0] == 3:
        (folder / PREPROCESSING_NAME).write_text(json.dumps(data_config), encoding="utf-8")
    if (fingerprint := base_fingerprint(model)) is not None:
        (folder / BASE_NAME).write_text(json.dumps(fingerprint), encoding="utf-8")

    # `load_pretrained` rejects patterns that RE2 does not support. Replace such a pattern by the module names that it
    # matches.
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name or config["base_model_name_or_path"]
    modules = [target.name for target in iter_target_modules(model.get_base_model())]
    for field in ("target_modules", "exclude_modules"):
        pattern = config.get(field)
        if isinstance(pattern, str):
            try:
                _matches(field, pattern, modules)
            except ValueError:  # RE2 does not support the pattern
                config[field] = exact_pattern(name for name in modules if re.fullmatch(pattern, name))
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def read_configuration(path: Path) -> PeftConfig:
    """Read the configuration of an adapter from the JSON file `path`.

    The result is an instance of the PEFT configuration class that belongs to the value of the key `peft_type`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, or contains an unknown or unsafe key or value.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not {"peft_type", "base_model_name_or_path"} <= found.keys():
            raise ValueError("peft_type or base_model_name_or_path is missing")
    except FileNotFoundError as error:
        folder, hint = path.parent, ""
        if (folder / BACKBONE_FILES[0]).exists():
            hint = ", but a whole model: load it with peft_edge.load_backbone"
        elif found := [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]:
            hint = f". Pass its subfolder {found[0]}"
        raise FileNotFoundError(f"{path} is missing: {folder} contains no adapter{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected the configuration of an adapter: {error}") from error
    if found["peft_type"] not in _PEFT_TYPES:
        raise ValueError(
            f"{path}: expected a peft_type of {', '.join(_PEFT_TYPES)}, found {found['peft_type']!r:.80}. PEFT's own "
            "PeftModel.from_pretrained loads other types: use it if you trust the source of the files"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[found["peft_type"]]
    _check_values(path, config_class, found)
    try:
        return config_class.from_peft_type(**found)
    except Exception as error:  # PEFT raises many kinds of errors for values that its type hints allow
        raise ValueError(f"{path}: {type(error).__name__}: {error!s:.500}") from error


def _check_values(path: Path, config_class: type[PeftConfig], found: dict[str, object]) -> None:
    """Raise a ValueError if `found` has an unknown or unsafe key or value.

    `found` is the configuration of an adapter, read from the JSON file `path`. `config_class` is the PEFT class of this
    configuration.
    """
    # Imported here to keep the import of the package fast.
    from pydantic import TypeAdapter, ValidationError

    # With `megatron_config`, PEFT would import the module that the key `megatron_core` names.
    if found.get("megatron_config") is not None:
        raise ValueError(f"{path}: megatron_config: expected null, as for every convolutional network")
    initial = found.get("init_lora_weights", True)
    if initial not in _INITIAL_WEIGHTS:
        raise ValueError(
            f"{path}: init_lora_weights: expected one of {_INITIAL_WEIGHTS}, found {initial!r:.80}: save the adapter "
            "again with path_initial_model_for_weight_conversion"
        )
    known, hints = {entry.name for entry in fields(config_class)}, get_type_hints(config_class)
    for key, value in found.items():
        if key not in known:
            nearest = difflib.get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ValueError(f"{path}: unknown key {key[:80]!r}; {hint}If a newer PEFT saved the adapter, upgrade PEFT")
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{path}: {key}: {error.errors()[0]['msg']}, found {value!r:.80}") from error


def resolve_patterns(config: PeftConfig, modules: Sequence[str]) -> None:
    """In `config`, replace each regular expression by the names in `modules` that it matches.

    `config` is changed in place. PEFT matches names with Python's `re`, which takes exponential time for some patterns
    ("catastrophic backtracking"). This function uses RE2 (Cox 2010, "Regular Expression Matching in the Wild"), which
    takes linear time.

    Raises:
        ValueError: If a pattern is invalid, or uses lookaround or backreferences, which RE2 does not support. If a
            field has more entries than `modules`. If an entry of `layers_pattern` contains other characters than
            letters, digits, `_` and `.`.
    """
    for field in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = getattr(config, field, None)
        if isinstance(value, str) and value not in _KEYWORDS:
            setattr(config, field, exact_pattern(_matches(field, value, modules)))
        elif isinstance(value, list | set | dict) and len(value) > len(modules):
            raise ValueError(f"{field}: expected at most the {len(modules)} modules of the network, found {len(value)}")
        elif isinstance(value, dict):
            # PEFT uses the first pattern that matches the end of a name. The loop visits the patterns in reverse order,
            # so that the first pattern overwrites the results of later patterns. Each new pattern starts with "^", so
            # that PEFT compares it with the whole name, not only with the end of the name.
            exact = {
                rf"^{re.escape(name)}": number
                for pattern, number in reversed(value.items())
                for name in _matches(field, rf"(?:.*\.)?(?:{pattern})", modules)
            }
            setattr(config, field, exact)
    layers = getattr(config, "layers_pattern", None) or []
    for name in [layers] if isinstance(layers, str) else layers:
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"layers_pattern: expected names of modules, found {name[:80]!r}")


def exact_pattern(names: Iterable[str]) -> str:
    """Return a regular expression that matches the given names and no others."""
    return "|".join(map(re.escape, sorted(names)))


def _matches(field: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Return the entries of `names` that match `pattern` from start to end.

    Raise a ValueError if RE2 does not support `pattern`. `field` is the configuration field that the message names.
    """
    # Imported here to keep the import of the package fast.
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        found = pc.match_substring_regex(pa.array(names, pa.string()), rf"\A(?:{pattern})\z")
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{field}: {pattern[:80]!r} is not a regular expression that can be matched in linear time: "
            f"{str(error)[:80]}"
        ) from error
    return [name for name, is_match in zip(names, found.to_pylist(), strict=True) if is_match]


def read_layout(path: Path) -> Layout:
    """Return the names, shapes and dtypes of the tensors in a safetensors file. Only the header of the file is read.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, its header is too large, or a tensor has an unsupported dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(HEADER_LIMIT, size):
            raise SafetensorError(f"its header would take {header_size:,} bytes")
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing. Pickled weights (.bin, .pth) are not read: save them as safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged: {size} bytes are not a complete safetensors file ({error}). Copy the "
            "file again from its source"
        ) from error
    if unknown := {dtype for _, dtype in found.values()} - _DTYPES.keys():
        raise ValueError(f"{path}: expected tensors of the dtypes {', '.join(_DTYPES)}, found {sorted(unknown)}")
    return {name: (shape, _DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def check_finite(path: Path) -> None:
    """Raise a ValueError if a tensor in a safetensors file contains NaN or infinity. The message names this tensor."""
    for name, tensor in safetensors.torch.load_file(path).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite. Copy the file again from its source")


def read_json(path: Path) -> object:
    """Read a JSON file, and return its content.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is larger than `JSON_LIMIT`, is not valid JSON, is nested too deeply, repeats a key, or
            contains NaN or infinity.
    """
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise ValueError(f"the file is larger than the limit of {JSON_LIMIT:,} bytes")
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the (key, value) pairs of a JSON object as a dict. Raise a ValueError if a key occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    """Convert a text to a number. Raise a ValueError if the number is NaN or infinite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value
