"""What is analysed: timm's networks, and the shapes of language models, with the same methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig
from torch import nn
from torch.optim import Optimizer

from peft_edge.backbones import load_backbone
from peft_edge.lean import Prefix
from peft_edge.optim import GaLoreAdamW
from peft_edge.profiling.analysis import Analysis, analyse, prepare_step
from peft_edge.roles import named_convolutions

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
        ValueError: There is no frozen prefix; see `Prefix`.
    """
    batch_size, image_size = step.pop("batch_size"), step.pop("image_size")
    accounting = step.pop("accounting")
    model, _ = prepare_step(backbone, method, adapter=adapter, **step)
    images = torch.zeros(2, 3, image_size, image_size).to(memory_format=torch.channels_last)
    prefix = Prefix(model, images)
    with torch.no_grad():
        size = prefix.features(images).shape[1:]
    return analyse(
        prefix.tail.train(), None, inputs=torch.empty(batch_size, *size, device="meta"), accounting=accounting
    )
