"""Read a run's configuration from YAML files and the command line, and report every error at once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from peft_edge.config.schema import COST_KEYS, RunConfig, Section, conflicts, missing_files
from peft_edge.names import nearest_name


class ConfigError(ValueError):
    """Raised with all errors in a configuration, one per line. Each line names the wrong key or argument.

    For a key, the line also says whether it was given in a file or on the command line.
    """


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with two rules of YAML 1.2: 1e-3 is a number, and `no` and `off` are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile("[-+]?[0-9]+[eE][-+]?[0-9]+$"), [*"-+0123456789"])


def load_config(arguments: Sequence[str], *, check_files: bool = False) -> RunConfig:
    """Read the configuration of a run from command-line arguments, without importing torch or PEFT.

    >>> arguments = ["output_dir=runs/a", "data.shift=blend", "--training.learning_rate", "1e-3"]
    >>> load_config([*arguments, "adapter.r=8"]).adapter
    AdapterConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules='all-conv')
    >>> load_config([*arguments, "adapter.rank=8"])
    Traceback (most recent call last):
    peft_edge.config.reader.ConfigError: 1 error in the configuration:
      adapter.rank: unknown key; did you mean adapter.r? (command line)

    Args:
        arguments: `--config FILE`, any number of times, and overrides: `key=value`, `--key value` or `--key=value`.
            Keys of a section are dotted (`training.epochs=3`). Values are read as YAML. A `--key` without a value
            sets the key to true. Overrides take precedence over all files, and a later file over an earlier file.
        check_files: Whether the folders and files that the configuration names must exist on this machine. If
            `output_dir` already contains `record.json`, they are not checked, because a finished run reads none of
            them, and only prints its summary.

    Raises:
        ConfigError: If a file or argument is unreadable, a key is unknown, a value has the wrong type or range, or
            values contradict each other. If a configuration file is unreadable, errors in values are not reported,
            because they may be due to the missing content of this file.
    """
    values, origins, errors, unread = _collect(arguments)
    config, invalid = _validate(values)
    found = [(key, message) for key, message in invalid if key not in unread]
    combined = [*conflicts(config)]
    if check_files and not Path(config.output_dir, "record.json").exists():
        combined += missing_files(config)
    # `_validate` has replaced invalid values by defaults. A contradiction in a section with an invalid value may come
    # from such a default, so it is not reported.
    wrong = {key.partition(".")[0] for key in (*unread, *dict(invalid))}
    found += [(key, message) for key, message in combined if key.partition(".")[0] not in wrong]
    if "config" in unread:
        found = []
    for key, message in found:
        # If `key` is a section, report the origin of the first key that was given in this section.
        origin = next((origin for given, origin in origins.items() if f"{given}.".startswith(f"{key}.")), "not given")
        errors.append(f"{key}: {message} ({origin})")
    if errors:
        noun = "error" if len(errors) == 1 else "errors"
        raise ConfigError("\n  ".join([f"{len(errors)} {noun} in the configuration:", *errors]))
    return config


def check_grid_keys(file: Path) -> None:
    """Check the keys in a grid file, which describes the runs of a study, without importing torch.

    `read_grid` later checks all other parts of the file.

    Raises:
        ConfigError: If the section `grid` of a block in the file contains an unknown key. The known keys are
            `COST_KEYS` in a block of cost analyses, and the configuration keys in a block of training runs. The message
            names all unknown keys.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # `read_grid` reports these errors
    errors = []
    for block in content if isinstance(content, list) else [content]:
        grid = block.get("grid") if isinstance(block, dict) else None
        keys = COST_KEYS if isinstance(block, dict) and "networks" in block else dict(_fields(RunConfig))
        for key in map(str, grid if isinstance(grid, dict) else ()):
            if not any(f"{known}.".startswith(f"{key}.") for known in keys):
                errors.append(f"{file}: grid.{key}: {_unknown(key, keys)}")
    if errors:
        raise ConfigError("\n".join(errors))


def to_yaml(config: RunConfig) -> str:
    """Return a YAML text with all keys and their values, including defaults. `load_config` can read it from a file."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return a dict with dotted keys and without nested dicts.

    >>> flatten({"seed": 1, "adapter": {"r": 4}})
    {'seed': 1, 'adapter.r': 4}
    """
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def describe_keys() -> str:
    """Return a help text that lists each key with its default (or "required") and its description."""
    return "\n\n".join(
        f"{key}: {'required' if field.is_required() else field.get_default()}\n"
        + textwrap.indent(field.description or "", "    ")
        for key, field in _fields(RunConfig)
    )


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _collect(arguments: Sequence[str]) -> tuple[dict[str, object], dict[str, str], list[str], set[str]]:
    """Parse the arguments. Return four collections: values by key, origins by key, error messages, and unread keys.

    The origin of a value is the name of a file, or "command line". The unread keys are those whose value could not be
    read. The key `config` is among them if a configuration file could not be read.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    errors: list[str] = []
    unread: set[str] = set()
    # Read all files before the overrides, so that overrides take precedence, wherever they are among the arguments.
    for key, text, argument in sorted(_split(arguments), key=lambda item: item[0] != "config"):
        try:
            if text is None:
                raise ConfigError("expected key=value or --key value")
            read = flatten(_read_file(Path(text))) if key == "config" else {key: yaml.load(text, _Loader)}
        except (ConfigError, yaml.YAMLError) as error:
            errors.append(f"{argument}: {' '.join(str(error).split())}")
            unread.add(key)
            continue
        values.update(read)
        origins.update(dict.fromkeys(read, text if key == "config" else "command line"))
    return values, origins, errors, unread


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Yield (key, text of the value, argument) for each configuration file and each override.

    The text is `true` for a `--key` without a value. It is None for `--config` without a file, and for an argument that
    neither begins with `--` nor contains `=`.
    """
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


def _read_file(path: Path) -> dict[str, object]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        nearest = _nearest_file(path)
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"cannot read {path}: there is no such file{where}{f'; did you mean {nearest}?' if nearest else ''}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _nearest_file(path: Path) -> str | None:
    """Return the path of the YAML file that the user probably meant by `path`, or None if no file is similar.

    `path` does not exist. The search starts in the deepest folder of `path` that exists. It covers the YAML files below
    this folder that have the same depth as `path`, or are one level deeper.
    """
    folder = next(parent for parent in path.parents if parent.is_dir())
    depth = len(path.relative_to(folder).parts)
    files = [file for level in (depth, depth + 1) for file in folder.glob("*/" * (level - 1) + "*.y*ml")]
    stem = nearest_name(path.stem, [file.stem for file in files])
    return nearest_name(str(path), [str(file) for file in files if file.stem == stem], cutoff=0)


def _validate(values: Mapping[str, object]) -> tuple[RunConfig, list[tuple[str, str]]]:
    """Return a configuration, and a pair (key, message) for each invalid value. Replace invalid values by defaults."""
    try:
        return RunConfig.model_validate(_nest(values)), []
    except ValidationError as error:
        keys = dict(_fields(RunConfig))
        found: dict[str, str] = {}
        for detail in error.errors():
            # pydantic's `loc` may continue after the key with a type or an index.
            location = ".".join(map(str, detail["loc"]))
            key = next((key for key in keys if f"{location}.".startswith(f"{key}.")), location)
            message = _explain(detail, key, keys)
            # If a key accepts several types, pydantic reports one error for each type. Join these messages.
            found[key] = f"{found[key]}, or {message}" if key in found else message
    valid = {key: value for key, value in values.items() if not any(f"{key}.".startswith(f"{bad}.") for bad in found)}
    return RunConfig.model_validate(_nest({"output_dir": "", **valid})), list(found.items())


def _nest(flat: Mapping[str, object]) -> dict[str, object]:
    nested: dict[str, object] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            inner = node.get(section)
            node[section] = inner = inner if isinstance(inner, dict) else {}
            node = inner
        node[name] = value
    return nested


def _explain(detail: ErrorDetails, key: str, keys: Collection[str]) -> str:
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "model_type":
        return f"expected a section of keys, found {detail['input']!r}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] != "extra_forbidden":
        return f"{detail['msg'].removeprefix('Input ')}, found {detail['input']!r}"
    return _unknown(key, keys)


def _unknown(key: str, keys: Collection[str]) -> str:
    section, _, name = key.rpartition(".")
    in_section = {valid.rpartition(".")[2]: valid for valid in keys if valid.rpartition(".")[0] == section}
    if not section:
        in_section |= {valid.partition(".")[0]: valid.partition(".")[0] for valid in keys}  # the sections themselves
    nearest = nearest_name(name, in_section, cutoff=0.55)
    alike = [nearest] if nearest else [other for other in in_section if name.startswith(other)]
    same_name = [valid for valid in keys if valid.rpartition(".")[2] == name]
    if suggestions := [in_section[other] for other in alike] or same_name:
        return f"unknown key; did you mean {' or '.join(suggestions)}?"
    return "unknown key" + (f"; the section {section} has {', '.join(in_section)}" if section and in_section else "")
