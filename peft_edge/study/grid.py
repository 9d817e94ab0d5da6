"""Read a grid file, and configure a job (a training run or a cost analysis) for each combination of its values."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import timm
import yaml
from pydantic import Field, ValidationError

from peft_edge.config import ConfigError, Section, load_config
from peft_edge.files import matching_files
from peft_edge.study.analyses import CostJob, CostSetting, is_transformer
from peft_edge.study.jobs import Job, RunJob

Values = Annotated[list[object], Field(min_length=1)]


class RunGrid(Section):
    """A block of a grid file that describes training runs.

    Attributes:
        recipes: Lists of configuration files; wildcards are supported. A run combines one file from each list. If files
            set the same key, the file from the later list takes precedence.
        grid: The values to try for each configuration key. These values override the configuration files.
    """

    recipes: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    grid: dict[str, Values] = Field(default={})


class CostGrid(Section):
    """A block of a grid file that describes cost analyses.

    Attributes:
        networks: Names of timm models, and JSON files with Transformers configurations; wildcards are supported.
        grid: The values to try for each attribute of `CostSetting`.
    """

    networks: Annotated[list[str], Field(min_length=1)]
    grid: dict[str, Values]


def read_grid(file: Path, output_dir: Path) -> list[Job]:
    """Read a grid file, and return one job (a training run or a cost analysis) for each combination of its values.

    The YAML file is a block with the keys of `RunGrid` or of `CostGrid`, or a list of such blocks. Paths in the file
    are relative to the folder of the file. Each job has its own folder in `output_dir`.

    Raises:
        ValueError: If the file is not a grid, if a path in the file matches no file, if two jobs have the same name, or
            if a job cannot be configured. If all blocks have the right keys, the message lists the problems of all
            blocks.
        OSError: If the file cannot be read.
    """
    jobs: list[Job] = []
    errors = []
    for block in _read_blocks(file):
        try:
            if isinstance(block, CostGrid):
                jobs += cost_jobs(block, file, output_dir)
            else:
                jobs += _run_jobs(block, file, output_dir)
        except ValueError as error:
            errors.append(str(error))
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            errors.append(f"{file}: give files different names, and each value once: {name} comes more than once")
    if errors:
        raise ValueError("\n".join(errors))
    return jobs


def _read_blocks(file: Path) -> list[RunGrid | CostGrid]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        blocks = content if content and isinstance(content, list) else [content]
        kinds = [CostGrid if isinstance(block, dict) and "networks" in block else RunGrid for block in blocks]
        return [kind.model_validate(block) for kind, block in zip(kinds, blocks, strict=True)]
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(
            f"{file}: expected `recipes`, a list of lists of files, or `networks`, a list of models, and `grid`, a "
            f"list of values for each key; or several such blocks: {error}"
        ) from error


def _run_jobs(block: RunGrid, file: Path, output_dir: Path) -> list[RunJob]:
    found = {pattern: matching_files(file.parent, pattern) for part in block.recipes for pattern in part}
    if missing := [pattern for pattern, paths in found.items() if not paths]:
        raise ValueError(f"{file}: no file matches {', '.join(missing)}, relative to {file.parent}")
    if "output_dir" in block.grid:
        raise ValueError(f"{file}: leave output_dir out: each run has a folder in the output folder of the study")
    recipes = [[path for pattern in part for path in found[pattern]] for part in block.recipes]
    jobs, errors = [], []
    for paths, values in itertools.product(itertools.product(*recipes), itertools.product(*block.grid.values())):
        texts = [yaml.safe_dump(value, default_flow_style=True, width=math.inf) for value in values]
        chosen = dict(zip(block.grid, (text.removesuffix("...\n").strip() for text in texts), strict=True))
        varied = {key: f"{key}={text}" for key, text in chosen.items() if len(block.grid[key]) > 1}
        parts = [path.stem for path in paths]
        setting = ", ".join([*parts, *(text for key, text in varied.items() if key != "seed")])
        arguments = [argument for path in paths for argument in ("--config", str(path))]
        arguments += [*(f"{key}={text}" for key, text in chosen.items()), "output_dir=."]
        try:
            config = load_config(arguments)
        except ConfigError as error:
            errors.append(f"{setting}: {error}")
            continue
        if config.cache_dir is not None:
            errors.append(f"{setting}: the cache of a study is in its output folder: leave cache_dir out")
            continue
        # A value such as the Hub id of a model can contain a slash, but the name of a folder cannot.
        folder = Path("--".join([*parts, *varied.values()]).replace("/", "_"))
        jobs.append(RunJob(setting, folder, config).moved_to(output_dir))
    if errors:
        raise ValueError("\n".join([f"{file}: {len(errors)} runs cannot be configured:", *errors]))
    return jobs


def cost_jobs(block: CostGrid, file: Path, output_dir: Path) -> list[CostJob]:
    """Return one job for each network in `block` and each combination of the values in its `grid`.

    The folders of the jobs are in `output_dir`. `file` is the grid file; paths in `block` are relative to its folder.
    """
    settings, errors = [], []
    for values in itertools.product(*block.grid.values()):
        chosen = dict(zip(block.grid, values, strict=True))
        try:
            settings.append(CostSetting.model_validate(chosen))
        except ValidationError as error:
            errors += [f"{chosen}: {entry['loc']}: {entry['msg']}" for entry in error.errors()]
    if errors:
        raise ValueError("\n".join([f"{file}: {len(errors)} analyses cannot be configured:", *errors]))
    jobs = []
    for network, setting in itertools.product(_find_networks(block, file), settings):
        options = setting.applicable_to(network)
        given = [(key, value) for key, value in options if key in options.model_fields_set - {"method"}]
        parts = [Path(network).stem, options.method, *(f"{key}={value}" for key, value in given if value is not None)]
        jobs.append(CostJob(", ".join(parts), output_dir / "--".join(parts), network, options))
    return jobs


def _find_networks(block: CostGrid, file: Path) -> Iterator[str]:
    for network in block.networks:
        if is_transformer(network):
            found = matching_files(file.parent, network)
            if not found:
                raise ValueError(f"{file}: no file matches {network}, relative to {file.parent}")
            yield from map(str, found)
        elif timm.is_model(network):
            yield network
        else:
            raise ValueError(
                f"{file}: {network} is neither a timm model nor a .json file; timm.list_models() lists the models"
            )
