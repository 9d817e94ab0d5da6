"""Reads a run's configuration from YAML files and the command line, and reports every error at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from peft_edge.config.schema import RunConfig, Section, conflicts


class ConfigError(ValueError):
    """Everything that is wrong with a configuration."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which reads as YAML 1.2 does: 1e-3 is a number, and `no` and `off` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(arguments: Sequence[str], *, choices: Mapping[str, Collection[str]] | None = None) -> RunConfig:
    """Builds the configuration of a run.

    Args:
        arguments: `--config FILE` and overrides: `key=value`, `--key value` or `--key=value`. The keys of a section are
            dotted (`training.epochs=3`), values are YAML, and a `--key` alone means true.
        choices: For keys whose values another module defines, those values.

    Raises:
        ConfigError: Unknown keys, wrong types, values out of range and impossible combinations, all of them, each with
            the file or the argument it comes from.
    """
    values, origins, errors = _collect(arguments)
    config, invalid = _validate(values)
    for key, message in [*invalid, *_outside(config, choices or {}), *conflicts(config)]:
        errors.append(f"{key}: {message} ({_origin(key, origins)})")
    if errors:
        noun = "error" if len(errors) == 1 else "errors"
        raise ConfigError("\n  ".join([f"{len(errors)} {noun} in the configuration:", *errors]))
    return config


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Where a key comes from, or the first key of a section."""
    return next((origin for given, origin in origins.items() if f"{given}.".startswith(f"{key}.")), "not given")


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration, every key included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested sections as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def describe_keys() -> str:
    """Returns every key with its default and its meaning."""
    return "\n\n".join(
        f"{key}: {'required' if field.is_required() else field.get_default()}\n    {field.description}"
        for key, field in _fields(RunConfig)
    )


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _collect(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Returns the given values by dotted key, where each comes from, and what could not be read."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    errors: list[str] = []
    # The files first, wherever they stand: what the command line says overrides them.
    for key, text, argument in sorted(_split(arguments), key=lambda item: item[0] != "config"):
        try:
            if text is None:
                raise ConfigError("expected key=value or --key value")
            read = flatten(_read_file(Path(text))) if key == "config" else {key: yaml.load(text, _Loader)}
        except (ConfigError, yaml.YAMLError) as error:
            errors.append(f"{argument}: {' '.join(str(error).split())}")
            continue
        values.update(read)
        origins.update(dict.fromkeys(read, text if key == "config" else "command line"))
    return values, origins, errors


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Yields key, text of the value (None if it has none) and the argument itself."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if equals:
            yield key, text, argument
        elif not argument.startswith("--"):
            yield key, None, argument
        elif rest and not rest[0].startswith("--") and not re.match(r"[\w.]+=", rest[0]):
            yield key, rest.pop(0), argument
        else:
            yield key, None if key == "config" else "true", argument


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _validate(values: dict[str, Any]) -> tuple[RunConfig, list[tuple[str, str]]]:
    """Returns the errors by key, and a configuration in which the values with an error are the defaults."""
    try:
        return RunConfig.model_validate(_nest(values)), []
    except ValidationError as error:
        keys = dict(_fields(RunConfig))
        found: dict[str, str] = {}
        for detail in error.errors():
            key = _key_of(detail["loc"], keys)
            message = _explain(detail, key, keys)
            # A value that may have several types yields an error for each.
            found[key] = f"{found[key]}, or {message}" if key in found else message
    valid = {key: value for key, value in values.items() if not any(f"{key}.".startswith(f"{bad}.") for bad in found)}
    return RunConfig.model_validate(_nest({"output_dir": "", **valid})), list(found.items())


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[name] = value
    return nested


def _key_of(location: tuple[int | str, ...], keys: Collection[str]) -> str:
    """The dotted key of an error; its location may go on into the value, by type and by index."""
    dotted = ".".join(map(str, location))
    return next((key for key in keys if f"{dotted}.".startswith(f"{key}.")), dotted)


def _explain(detail: ErrorDetails, key: str, keys: Collection[str]) -> str:
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "model_type":
        return f"expected a section of keys, found {detail['input']!r}"
    if detail["type"] != "extra_forbidden":
        return f"{detail['msg'].removeprefix('Input ')}, found {detail['input']!r}"
    section, _, name = key.rpartition(".")
    in_section = [valid for valid in keys if valid.rpartition(".")[0] == section]
    same_name = [valid for valid in keys if valid.rpartition(".")[2] == name]
    nearest = (
        difflib.get_close_matches(key, in_section, n=1, cutoff=0.8)
        or same_name
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    )
    return "unknown key" + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")


def _outside(config: RunConfig, choices: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str]]:
    values = flatten(config.model_dump())
    for key, allowed in choices.items():
        if values[key] not in allowed:
            nearest = difflib.get_close_matches(values[key], allowed, n=1, cutoff=0.0)[0]
            yield key, f"expected one of {', '.join(allowed)}, found {values[key]!r}; did you mean {nearest}?"
