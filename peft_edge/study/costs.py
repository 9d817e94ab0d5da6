"""What is analysed: timm's networks, and the shapes of language models, with the same methods.

What a step costs, as jobs of a grid: analyses of networks under methods.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import transformers
from peft import LoraConfig, PeftConfig
from pydantic import Field, ValidationError
from torch import nn
from torch.optim import Optimizer

from peft_edge.backbones import load_backbone
from peft_edge.config import Section
from peft_edge.config.schema import PositiveCount
from peft_edge.files import matching_files
from peft_edge.lean import FrozenPrefix
from peft_edge.lean.layers import Masks
from peft_edge.methods import find_method
from peft_edge.optim import GaLoreAdamW
from peft_edge.profiling.analysis import Analysis, analyse, prepare_step
from peft_edge.profiling.flops import Accounting
from peft_edge.records import CostRecord, add_record, package_info, read_record
from peft_edge.roles import named_convolutions
from peft_edge.study.jobs import Job
from peft_edge.tuners.norm import Norm

NUM_CLASSES = 10
"""Of timm's networks: what a small adaptation has."""

TRANSFORMER_METHODS = ("full", "lora", "dora", "galore")
"""Full fine-tuning, PEFT's own adapters on every linear layer but the last, and GaLore on the same layers."""


def load_network(network: str) -> nn.Module:
    """Builds a network that is analysed.

    Args:
        network: A timm model name; or a JSON file with the configuration of a Transformers model, which is built on the
            meta device, where it takes no memory.

    Raises:
        ValueError: timm has no such model, or the file is no such configuration.
        OSError: The file cannot be read.
    """
    if not network.endswith(".json"):
        return load_backbone(network, NUM_CLASSES)
    try:
        block = json.loads(Path(network).read_text(encoding="utf-8"))
        (name,) = block.pop("architectures")
        config = transformers.AutoConfig.for_model(**block)
        with torch.device("meta"):
            return getattr(transformers, name)(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{network} is no configuration of a Transformers model with `model_type` and one name in `architectures`: "
            f"{error!r}"
        ) from error


def kind_of(model: nn.Module) -> str:
    """Returns `depthwise` if there is a depthwise convolution, `standard` if there are others, else `transformer`."""
    roles = [roles for _, _, roles in named_convolutions(model)]
    return "depthwise" if any("depthwise" in of_one for of_one in roles) else "standard" if roles else "transformer"


def analyse_transformer(model: nn.Module, method: str, lora_rank: int | None, **step: Any) -> Analysis:
    """Analyses a step of a language model, with AdamW.

    Args:
        model: From `load_network`.
        method: One of `TRANSFORMER_METHODS`.
        lora_rank: Of the adapters, or of GaLore's projection; None for full fine-tuning.
        **step: Batch size and length; see `analyse`.

    Raises:
        ValueError: The method is none of them.
    """
    if method not in TRANSFORMER_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(TRANSFORMER_METHODS)} for a language model")
    if method == "full":
        return analyse(model, None, **step)
    if lora_rank is None:
        raise ValueError(f"{method} needs a lora_rank")
    if method == "galore":
        return analyse(model, None, optimizer=_galore(model, lora_rank), **step)
    return analyse(model, _lora(model, lora_rank, use_dora=method == "dora"), **step)


def _lora(model: Any, lora_rank: int, *, use_dora: bool) -> PeftConfig:
    # By it PEFT leaves the last layer out, which is not adapted, and trains a new classifier.
    task = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    return LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", use_dora=use_dora, task_type=task
    )


def _galore(model: Any, lora_rank: int) -> Any:
    vocabulary = model.config.vocab_size

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for parameter in parameters:
            is_projected = parameter.ndim == 2 and min(parameter.shape) > lora_rank
            groups[is_projected and vocabulary not in parameter.shape].append(parameter)
        galore: dict[str, Any] = {"rank": lora_rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": groups[0]}, {"params": groups[1], **galore}])

    return make


def analyse_replay(backbone: nn.Module, method: str, *, adapter: dict[str, Any], **step: Any) -> Analysis:
    """Analyses a step on stored features, as in every epoch but the first: that of the tail alone.

    Args:
        backbone: From `load_network`; changed.
        method: One that leaves the first layers alone, with these options.
        adapter: See `analyse`, as for the others.
        **step: `lora_rank`, `batch_size`, `image_size`, `accounting`.

    Raises:
        ValueError: There is no frozen prefix; see `FrozenPrefix`.
    """
    batch_size, image_size = step.pop("batch_size"), step.pop("image_size")
    accounting = step.pop("accounting")
    model, _ = prepare_step(backbone, method, adapter=adapter, **step)
    images = torch.zeros(2, 3, image_size, image_size).to(memory_format=torch.channels_last)
    prefix = FrozenPrefix(model, images)
    with torch.no_grad():
        size = prefix.features(images).shape[1:]
    return analyse(
        prefix.tail.train(), None, inputs=torch.empty(batch_size, *size, device="meta"), accounting=accounting
    )


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

    inplace_norm: bool = False
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
class CostJob(Job):
    """One analysis."""

    network: str
    """See `load_network`."""

    asked: CostSetting
    """The rest."""

    @property
    def result_name(self) -> str:
        """The job's name, after what it is."""
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


def cost_jobs(block: CostGrid, file: Path, output_dir: Path) -> list[CostJob]:
    """Returns the jobs of a block.

    Args:
        block: The block.
        file: The grid's file.
        output_dir: Each job gets a folder in it.

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
    jobs = []
    for network in _networks(block, file):
        for asked in settings:
            setting = asked.applicable_to(network)
            parts = [Path(network).stem, setting.method, *_parts(setting)]
            jobs.append(CostJob(", ".join(parts), output_dir / "--".join(parts), network, setting))
    return jobs


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
    lean = {"masks": setting.lean, "inplace_norm": setting.inplace_norm} if setting.lean is not None else None
    return analyse(model, setting.method, lora_rank=rank, adapter=adapter, lean=lean, **step)
