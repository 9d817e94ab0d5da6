"""Cost analyses as jobs of a study: one training step of a timm network or a language model, from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import nn
from torch.optim import Optimizer

from peft_edge.backbones import load_backbone
from peft_edge.config import Section
from peft_edge.config.schema import PositiveCount
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
"""The number of classes of timm's networks, as in a small adaptation."""

TRANSFORMER_METHODS = ("full", "lora", "dora", "galore")
"""Full fine-tuning, PEFT's adapters on every linear layer but the last, and GaLore on the same layers."""


class CostSetting(Section):
    """The options of an analysis. A value of null leaves the option to the method.

    Attributes:
        method: A key of `METHODS`; for a language model one of `TRANSFORMER_METHODS`.
        lora_rank: The rank of the adapters, or of GaLore's projection.
        batch_size: The number of images or sequences.
        image_size: Height and width in pixels.
        sequence_length: The number of tokens in a sequence.
        target_modules: A layer role, or a regular expression.
        norm: How the method treats BatchNorm.
        lean: How lean activations store their masks; null for a model that is not made lean.
        inplace_norm: Whether lean convolutions apply the frozen BatchNorm after them in place.
        replay: Whether the step trains on stored features, as in every epoch but the first.
        accounting: How FLOPs are counted.
    """

    method: str
    lora_rank: PositiveCount | None = 4
    batch_size: PositiveCount = 16
    image_size: PositiveCount | None = 224
    sequence_length: PositiveCount | None = 512
    target_modules: str | None = None
    norm: Norm | None = None
    lean: Masks | None = None
    inplace_norm: bool = False
    replay: bool = False
    accounting: Accounting = "exact"

    def applicable_to(self, network: str) -> CostSetting:
        """Return the same options, with null for those that do not apply to the network or the method."""
        if is_transformer(network):
            unused = {"image_size", "target_modules", "norm"} | ({"lora_rank"} if self.method == "full" else set())
        else:
            has_rank = find_method(self.method).section in ("adapter", "galore")
            unused = {"sequence_length"} | (set() if has_rank else {"lora_rank", "target_modules"})
        return self.model_copy(update=dict.fromkeys(unused))

    def without_method(self) -> dict[str, object]:
        """Return the options as a record states them."""
        return self.model_dump(exclude={"method"})


@dataclass(frozen=True)
class CostJob(Job):
    """One cost analysis of a network, as `load_network` takes it."""

    network: str
    options: CostSetting

    @property
    def result_name(self) -> str:
        """The name of the job, prefixed with `cost`."""
        return f"cost--{self.name}"

    @property
    def record(self) -> CostRecord | None:
        """The last result; None if there is none, or it has other options."""
        record = read_record(self.folder / "record.json", CostRecord)
        return record if record is not None and record.setting == self.options.without_method() else None

    def run(self) -> None:
        """Analyse the step and write the record."""
        add_record(self.folder, "record", analyse_cost(self.network, self.options))

    def record_failure(self, reason: str) -> None:
        """Do nothing: a failed analysis has no record, and the log has the reason."""


def is_transformer(network: str) -> bool:
    """Return whether the network is given as a file with a Transformers configuration."""
    return network.endswith(".json")


def load_network(network: str) -> nn.Module:
    """Build a timm model by name, or a Transformers model from a JSON file with its configuration.

    The latter is built on the meta device, where it takes no memory.

    Raises:
        ValueError: If timm has no such model, or the file is not such a configuration.
        OSError: If the file cannot be read.
    """
    if not is_transformer(network):
        return load_backbone(network, NUM_CLASSES)
    try:
        block = json.loads(Path(network).read_text(encoding="utf-8"))
        (name,) = block.pop("architectures")
        config = transformers.AutoConfig.for_model(**block)
        with torch.device("meta"):
            return getattr(transformers, name)(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{network} is not the configuration of a Transformers model, which has `model_type` and one name in "
            f"`architectures`: {error!r}"
        ) from error


def kind_of(model: nn.Module) -> str:
    """Return `depthwise` for a network with depthwise convolutions, `standard` with others only, else `transformer`."""
    roles = [roles for _, _, roles in named_convolutions(model)]
    return "depthwise" if any("depthwise" in of_one for of_one in roles) else "standard" if roles else "transformer"


def analyse_cost(network: str, setting: CostSetting) -> CostRecord:
    """Analyse one training step of a network, as `load_network` takes it."""
    model, setting = load_network(network), setting.applicable_to(network)
    kind = kind_of(model)
    keys = {"batch_size", "image_size", "sequence_length", "accounting"}
    step = setting.model_dump(include=keys, exclude_none=True)
    if is_transformer(network):
        analysis = analyse_transformer(model, setting.method, setting.lora_rank, **step)
    else:
        analysis = _analyse_backbone(model, setting, **step)
    return CostRecord(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        network=Path(network).stem,
        kind=kind,
        method=setting.method,
        setting=setting.without_method(),
        num_total_params=analysis.num_total_params,
        profile=analysis.profile[0],
        package_info=package_info(),
    )


def _analyse_backbone(model: nn.Module, setting: CostSetting, **step: Any) -> Analysis:
    section = find_method(setting.method).section
    adapter = setting.model_dump(include={"norm", "target_modules"}, exclude_none=True)
    if section == "galore":
        adapter["rank"] = setting.lora_rank
    rank = setting.lora_rank if section == "adapter" else None
    if setting.replay:
        return analyse_replay(model, setting.method, adapter=adapter, lora_rank=rank, **step)
    lean = {"masks": setting.lean, "inplace_norm": setting.inplace_norm} if setting.lean is not None else None
    return analyse(model, setting.method, lora_rank=rank, adapter=adapter, lean=lean, **step)


def analyse_replay(
    backbone: nn.Module,
    method: str,
    *,
    adapter: Mapping[str, object],
    lora_rank: int | None,
    batch_size: int,
    image_size: int,
    accounting: Accounting,
) -> Analysis:
    """Analyse a step of the tail alone, on the features of a `FrozenPrefix`. The backbone is changed."""
    model, _ = prepare_step(backbone, method, adapter=adapter, lora_rank=lora_rank)
    images = torch.zeros(2, 3, image_size, image_size).to(memory_format=torch.channels_last)
    prefix = FrozenPrefix(model, images)
    with torch.no_grad():
        size = prefix.features(images).shape[1:]
    inputs = torch.empty(batch_size, *size, device="meta")
    return analyse(prefix.tail.train(), None, inputs=inputs, accounting=accounting)


def analyse_transformer(
    model: transformers.PreTrainedModel, method: str, lora_rank: int | None, **step: Any
) -> Analysis:
    """Analyse a step of a language model with AdamW, under one of `TRANSFORMER_METHODS`.

    `lora_rank` is the rank of the adapters or of GaLore's projection. `step` has the other arguments of `analyse`.

    Raises:
        ValueError: If the method is unknown, or needs a rank.
    """
    if method not in TRANSFORMER_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(TRANSFORMER_METHODS)} for a language model")
    if method == "full":
        return analyse(model, None, **step)
    if lora_rank is None:
        raise ValueError(f"{method} needs a lora_rank")
    if method == "galore":
        return analyse(model, None, optimizer=_galore(lora_rank, model.config.vocab_size), **step)
    # From the task type, PEFT knows that the last layer is not adapted, and that a new classifier is trained.
    task_type = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    use_dora = method == "dora"
    lora = LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", use_dora=use_dora, task_type=task_type
    )
    return analyse(model, lora, **step)


def _galore(rank: int, vocabulary: int) -> Callable[[list[nn.Parameter]], Optimizer]:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for parameter in parameters:
            is_projected = parameter.ndim == 2 and min(parameter.shape) > rank
            groups[is_projected and vocabulary not in parameter.shape].append(parameter)
        galore: dict[str, Any] = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": groups[0]}, {"params": groups[1], **galore}])

    return make
