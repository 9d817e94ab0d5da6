"""Run cost analyses as jobs of a study. A cost analysis computes the cost of one training step from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
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
"""The number of classes of every timm model that is analysed."""

TRANSFORMER_METHODS = ("full", "lora", "dora", "galore")
"""The methods for Transformers models.

`full` is full fine-tuning. `lora` and `dora` are PEFT's adapters on all linear layers except the output layer. `galore`
projects the gradient of a matrix if both sides of the matrix are longer than the rank and neither side has the size of
the vocabulary.
"""


class CostSetting(Section):
    """The options of a cost analysis.

    Attributes:
        method: A key of `METHODS`; for a Transformers model, one of `TRANSFORMER_METHODS`.
        lora_rank: The rank of the adapters or of GaLore's projection. For adapters of timm models, null means the
            default of the method. GaLore, and adapters of Transformers models, require a number.
        batch_size: The number of images or sequences.
        image_size: Height and width of the images in pixels.
        sequence_length: The number of tokens in a sequence.
        target_modules: The layers to adapt: a key of `ROLES` such as `all-conv`, or a regular expression for module
            names; null means the default of the method.
        norm: How the method treats BatchNorm layers; null means `stats`.
        lean: The argument `masks` of `prepare_model_for_lean_training`; null means training without lean layers.
        inplace_norm: The argument `inplace_norm` of `prepare_model_for_lean_training`. If `lean` is null, it has no
            effect.
        replay: Whether the step trains on cached outputs of the frozen first layers. If true, `lean` and `inplace_norm`
            have no effect.
        accounting: The rules by which FLOPs are counted; see `FlopCounter`.
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
        """Return a copy in which options that do not apply to `network` or `method` are None.

        Raises:
            ValueError: If `lora_rank` is None and `method` has no default rank on this network.
        """
        is_language_model = is_transformer(network)
        if self.lora_rank is None and (self.method == "galore" or (is_language_model and self.method != "full")):
            raise ValueError(
                f"{network}, method {self.method}: lora_rank is null, expected a number, because only adapters of "
                "timm models have a default rank"
            )
        if is_language_model:
            unused = {"image_size", "target_modules", "norm"} | ({"lora_rank"} if self.method == "full" else set())
        else:
            has_rank = find_method(self.method).section in ("adapter", "galore")
            unused = {"sequence_length"} | (set() if has_rank else {"lora_rank", "target_modules"})
        return self.model_copy(update=dict.fromkeys(unused))


@dataclass(frozen=True)
class CostJob(Job):
    """A cost analysis as a job of a study. `network` is a timm name or a JSON file; see `load_network`."""

    network: str
    options: CostSetting

    @property
    def result_name(self) -> str:
        """The file name, without `.json`, under which the job's results are copied to the study's results folder."""
        return f"cost--{self.name}"

    @property
    def record(self) -> CostRecord | None:
        """The record of the last analysis. None if there is no record, or if the last analysis had other options."""
        record = read_record(self.folder / "record.json", CostRecord)
        return record if record is not None and record.setting == self.options.model_dump(exclude={"method"}) else None

    def check_folder(self) -> None:
        """Do nothing, because `folder` contains at most the result of an earlier analysis, which may be replaced."""

    def train_source(self) -> None:
        """Do nothing, because an analysis needs no trained weights."""

    def run(self) -> None:
        """Analyse the training step, and write the record."""
        add_record(self.folder, "record", analyse_cost(self.network, self.options))

    def record_failure(self, reason: str) -> None:
        """Do nothing, because a failed analysis has no record. The job's log contains the reason for the failure."""


def is_transformer(network: str) -> bool:
    """Return whether `network` is the path of a Transformers configuration. Such a path ends with `.json`."""
    return network.endswith(".json")


def load_network(network: str) -> nn.Module:
    """Build a timm model from its name, or a Transformers model from a JSON file with its configuration.

    A timm model is on the default device, and a Transformers model on the meta device.

    Raises:
        ValueError: If timm has no model of this name, or if the file is not the configuration of a Transformers model.
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
    """Return the kind of a network: `depthwise`, `standard` or `transformer`.

    A network with at least one depthwise convolution is `depthwise`. A network without any convolution is
    `transformer`. All other networks are `standard`.
    """
    roles = [roles for _, _, roles in named_convolutions(model)]
    return "depthwise" if any("depthwise" in of_one for of_one in roles) else "standard" if roles else "transformer"


def analyse_cost(network: str, setting: CostSetting) -> CostRecord:
    """Compute the cost of one training step. `network` is a timm name or a JSON file; see `load_network`."""
    model, setting = load_network(network), setting.applicable_to(network)
    kind = kind_of(model)
    step = setting.model_dump(include={"batch_size", "image_size", "sequence_length", "accounting"}, exclude_none=True)
    if is_transformer(network):
        analysis = analyse_transformer(model, setting.method, setting.lora_rank, **step)
    else:
        analysis = _analyse_backbone(model, setting, **step)
    return CostRecord(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        network=Path(network).stem,
        kind=kind,
        method=setting.method,
        setting=setting.model_dump(exclude={"method"}),
        num_total_params=analysis.num_total_params,
        profile=analysis.profile[0],
        package_info=package_info(),
    )


def _analyse_backbone(model: nn.Module, setting: CostSetting, **step: Any) -> Analysis:
    section = find_method(setting.method).section
    adapter = {"norm": "stats"} | setting.model_dump(include={"norm", "target_modules"}, exclude_none=True)
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
    """Analyse a step that trains the later layers of `backbone` on cached outputs of the frozen first layers.

    The function applies `method` to `backbone` in place. `FrozenPrefix` then splits the network after the frozen first
    layers.
    """
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
    """Analyse a step of a language model that is trained with one of `TRANSFORMER_METHODS` and AdamW or GaLoreAdamW.

    `lora_rank` is the rank of the adapters or of GaLore's projection. `step` contains further arguments of `analyse`.

    Raises:
        ValueError: If `method` is unknown, or if `lora_rank` is None and `method` is not `full`.
    """
    if method not in TRANSFORMER_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(TRANSFORMER_METHODS)} for a language model")
    if method == "full":
        return analyse(model, None, **step)
    if lora_rank is None:
        raise ValueError(f"{method} needs a lora_rank")
    if method == "galore":
        return analyse(model, None, optimizer=partial(_galore, lora_rank, model.config.vocab_size), **step)
    # PEFT uses the task type to find the last layer, and adds no adapter there. For SEQ_CLS, PEFT trains this layer.
    task_type = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    lora: dict[str, Any] = {"r": lora_rank, "lora_alpha": 2 * lora_rank, "use_dora": method == "dora"}
    return analyse(model, LoraConfig(target_modules="all-linear", task_type=task_type, **lora), **step)


def _galore(rank: int, vocabulary: int, parameters: list[nn.Parameter]) -> Optimizer:
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in parameters:
        is_projected = parameter.ndim == 2 and min(parameter.shape) > rank
        groups[is_projected and vocabulary not in parameter.shape].append(parameter)
    galore: dict[str, Any] = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": groups[0]}, {"params": groups[1], **galore}])
