"""What a step costs, as cells of a grid: analyses of networks under methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import timm
from pydantic import Field, ValidationError

from peft_edge.archive import add_record, read_record
from peft_edge.config import Section
from peft_edge.config.sections import PositiveCount
from peft_edge.files import matching_files
from peft_edge.lean.layers import Masks
from peft_edge.machine import package_info
from peft_edge.methods import find_method
from peft_edge.profiling.analysis import Analysis, analyse
from peft_edge.profiling.flops import Accounting
from peft_edge.records import CostRecord
from peft_edge.study.cells import Cell
from peft_edge.study.networks import analyse_replay, analyse_transformer, kind_of, load_network
from peft_edge.tuners.norm import Norm


class CostSetting(Section):
    """How a step is analysed. What is null is left to the method."""

    method: str
    """A key of `METHODS`; for a language model one of `TRANSFORMER_METHODS`."""

    lora_rank: PositiveCount | None = 4
    """Of the adapters, and of GaLore's projection."""

    batch_size: PositiveCount = 16
    """Images or sequences."""

    image_size: PositiveCount | None = 224
    """Height and width in pixels."""

    sequence_length: PositiveCount | None = 512
    """Tokens in a sequence."""

    target_modules: str | None = None
    """A layer role, or a regular expression."""

    norm: Norm | None = None
    """What the method changes in the BatchNorm layers."""

    lean: Masks | None = None
    """How lean activations keep what they need; null where the model is not made lean."""

    fold_norm: bool = False
    """Whether lean convolutions apply the frozen BatchNorm behind them."""

    replay: bool = False
    """Whether the step trains on stored features, as those of all epochs but the first do."""

    accounting: Accounting = "exact"
    """How FLOPs are counted."""

    def applicable_to(self, network: str) -> CostSetting:
        """The same with null for what means nothing for the network, or for the method."""
        if _is_transformer(network):
            unused = {"image_size", "target_modules", "norm"} | ({"lora_rank"} if self.method == "full" else set())
        else:
            has_rank = find_method(self.method).section in ("adapter", "galore")
            unused = {"sequence_length"} | (set() if has_rank else {"lora_rank", "target_modules"})
        return self.model_copy(update=dict.fromkeys(unused))


def _is_transformer(network: str) -> bool:
    return network.endswith(".json")


class CostGrid(Section):
    """The block of a grid file that asks for analyses."""

    networks: Annotated[list[str], Field(min_length=1)]
    """timm's models, and files of Transformers configurations, with wildcards, relative to the grid's file."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]]
    """Values to try for each key of `CostSetting`."""


@dataclass(frozen=True)
class CostCell(Cell):
    """One analysis."""

    network: str
    """See `load_network`."""

    asked: CostSetting
    """The rest."""

    @property
    def result_name(self) -> str:
        """The cell's name, after what it is."""
        return f"cost--{self.name}"

    @property
    def record(self) -> CostRecord | None:
        """What was found the last time; None if nothing is known, or if something else was asked.

        Raises:
            ValueError: The record is damaged; the message names the file.
        """
        record = read_record(self.folder / "record.json", CostRecord)
        return record if record is not None and record.setting == _stated(self.asked) else None

    def run(self) -> None:
        """Analyses the step."""
        add_record(self.folder, "record", analyse_cost(self.network, self.asked))

    def record_failure(self, reason: str) -> None:
        """Does nothing: an analysis has either a record or no result."""


def cost_cells(block: CostGrid, file: Path, output_dir: Path) -> list[CostCell]:
    """Returns the cells of a block.

    Args:
        block: The block.
        file: The grid's file.
        output_dir: Each cell gets a folder in it.

    Raises:
        ValueError: A pattern finds no file, timm has no such model, or settings have errors; all of these are named.
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
    cells = []
    for network in _networks(block, file):
        for asked in settings:
            setting = asked.applicable_to(network)
            parts = [Path(network).stem, setting.method, *_parts(setting)]
            cells.append(CostCell(", ".join(parts), output_dir / "--".join(parts), network, setting))
    return cells


def _networks(block: CostGrid, file: Path) -> Iterator[str]:
    for network in block.networks:
        if _is_transformer(network):
            found = matching_files(file.parent, network)
            if not found:
                raise ValueError(f"{file}: no file is found for {network}, seen from {file.parent}")
            yield from map(str, found)
        elif timm.is_model(network):
            yield network
        else:
            raise ValueError(f"{file}: {network} is no timm model and no .json file; timm.list_models() has the names")


def _parts(setting: CostSetting) -> list[str]:
    """What the grid says, and what is not left out."""
    said = {key: value for key, value in setting if key in setting.model_fields_set - {"method"}}
    return [f"{key}={value}" for key, value in said.items() if value is not None]


def _stated(setting: CostSetting) -> dict[str, Any]:
    return setting.model_dump(exclude={"method"})


def analyse_cost(network: str, setting: CostSetting) -> CostRecord:
    """Analyses one step.

    Args:
        network: See `load_network`.
        setting: The rest.

    Raises:
        ValueError: The setting does not fit the network.
    """
    model, setting = load_network(network), setting.applicable_to(network)
    kind = kind_of(model)
    step: dict[str, Any] = {"batch_size": setting.batch_size, "accounting": setting.accounting}
    if _is_transformer(network):
        step["sequence_length"] = setting.sequence_length
        analysis = analyse_transformer(model, setting.method, setting.lora_rank, **step)
    else:
        analysis = _analyse_backbone(model, setting, image_size=setting.image_size, **step)
    return CostRecord(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        network=Path(network).stem,
        kind=kind,
        method=setting.method,
        setting=_stated(setting),
        num_total_params=analysis.num_total_params,
        profile=analysis.profile[0],
        package_info=package_info(),
    )


def _analyse_backbone(model: Any, setting: CostSetting, **step: Any) -> Analysis:
    section = find_method(setting.method).section
    adapter = {key: getattr(setting, key) for key in ("norm", "target_modules") if getattr(setting, key) is not None}
    if section == "galore":
        adapter["rank"] = setting.lora_rank
    rank = setting.lora_rank if section == "adapter" else None
    if setting.replay:
        return analyse_replay(model, setting.method, adapter=adapter, lora_rank=rank, **step)
    lean = {"masks": setting.lean, "fold_norm": setting.fold_norm} if setting.lean is not None else None
    return analyse(model, setting.method, lora_rank=rank, adapter=adapter, lean=lean, **step)
