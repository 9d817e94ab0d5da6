"""The methods: how each turns a source model into one whose update is trained, and which optimizer trains it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

from peft_edge.backbones import head_names
from peft_edge.optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreSGD,
    decay_groups,
    galore_param_groups,
    update_in_backward,
)
from peft_edge.roles import ROLES, modules_with_role
from peft_edge.tuners.conv_adapter import ConvAdapterConfig
from peft_edge.tuners.conv_lora import ConvLoraConfig

Options = Mapping[str, Any]
Prepare = Callable[[nn.Module, Options], nn.Module]
OptimizerFactory = Callable[..., Optimizer]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": AdamW,
    "sgd": SGD,
    "sgd-momentum": partial(SGD, momentum=0.9),
    "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False),
}
"""By name: torch's, with its defaults, and Transformers' Adafactor with a given learning rate."""

_GALORE: dict[str, OptimizerFactory] = {
    "adamw": GaLoreAdamW,
    "sgd": partial(GaLoreSGD, momentum=0.0),
    "sgd-momentum": GaLoreSGD,
    "adafactor": GaLoreAdafactor,
}


def _plain_optimizer(model: nn.Module, name: str, options: Options, *, lr: float, weight_decay: float) -> Optimizer:
    return OPTIMIZERS[name](decay_groups(model, weight_decay), lr=lr)


def _galore_optimizer(model: nn.Module, name: str, options: Options, *, lr: float, weight_decay: float) -> Optimizer:
    names = ("rank", "update_proj_gap", "scale", "proj_type", "target_modules")
    # Layers are called by the names that they have in the backbone.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    groups = galore_param_groups(base, weight_decay=weight_decay, **{key: options[key] for key in names})
    optimizer = _GALORE[name](groups, lr=lr)
    if options["layerwise"]:
        update_in_backward(optimizer)
    return optimizer


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a model. To add another: `METHODS["its-name"] = Method(prepare=...)`."""

    prepare: Prepare
    """From a timm model, changed in place, and the method's options to the model with its update."""

    section: str | None = "adapter"
    """The section of the configuration with the method's options, to which `norm` is added; None: only that."""

    optimizer: Callable[..., Optimizer] | None = _plain_optimizer
    """From the prepared model, a key of `OPTIMIZERS`, the options, and `lr` and `weight_decay`; None: nothing is
    trained by gradients."""

    saves_full_model: bool = False
    """Whether the update is the whole model, as where the base model's own weights are trained, or an adapter."""


def _freeze(model: nn.Module, options: Options) -> nn.Module:
    return model.requires_grad_(False)


def _adapter(config: type[PeftConfig], **fixed: Any) -> Prepare:
    def prepare(model: nn.Module, options: Options) -> nn.Module:
        return get_peft_model(model, config(**options, **fixed, modules_to_save=head_names(model)))

    return prepare


def _no_layers(*, saves_head: bool = True, **fixed: Any) -> Prepare:
    """An adapter of the norms alone, so that BatchNorm means the same for every method, on any number of processes."""

    def prepare(model: nn.Module, options: Options) -> nn.Module:
        saved = head_names(model) if saves_head else None
        settings = {"target_modules": DUMMY_TARGET_MODULES, "norm": options["norm"], "modules_to_save": saved}
        return get_peft_model(model, ConvLoraConfig(**{**settings, **fixed}))

    return prepare


def _everything(model: nn.Module, options: Options) -> nn.Module:
    # The model's own weights and biases are trained, so that the norms need none of the adapter's.
    norm = "stats" if options["norm"] == "affine" else options["norm"]
    return _no_layers(saves_head=False)(model, {"norm": norm}).requires_grad_(True)


def _peft(config: type[PeftConfig], names: Mapping[str, str], **fixed: Any) -> Prepare:
    """PEFT's own adapter, with BatchNorm saved as a part of it in the one way that PEFT has: as whole modules."""

    def prepare(model: Any, options: Options) -> nn.Module:
        norm, targets = options["norm"], options["target_modules"]
        if norm not in ("stats", "affine"):
            raise ValueError(
                f"norm: {norm!r} is not for PEFT's own adapters, which have no say in what BatchNorm normalises by: "
                "choose stats or affine, or a method without peft- in its name"
            )
        if targets in ROLES:
            targets = "|".join(map(re.escape, modules_with_role(model, targets)))
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        settings = {theirs: options[ours] for ours, theirs in names.items()}
        try:
            model = get_peft_model(
                model, config(**settings, **fixed, target_modules=targets, modules_to_save=[*head_names(model), *norms])
            )
        except ValueError as error:
            raise ValueError(
                f"PEFT's own {config.__name__} does not fit: {error} adapter.target_modules=dense leaves grouped "
                "convolutions out"
            ) from error
        if norm == "stats":
            for name in norms:
                model.base_model.model.get_submodule(name).requires_grad_(False)
        return model

    return prepare


_PEFT_LORA = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_PEFT_LYCORIS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "rank_dropout"}

METHODS: dict[str, Method] = {
    "none": Method(prepare=_freeze, section=None, optimizer=None),
    "head": Method(prepare=_no_layers(), section=None),
    "norm-stats": Method(prepare=_no_layers(saves_head=False, norm="recalibrate"), section=None, optimizer=None),
    "norm-affine": Method(prepare=_no_layers(norm="affine"), section=None),
    "bias": Method(prepare=_no_layers(bias="all"), section=None),
    "full": Method(prepare=_everything, section=None, saves_full_model=True),
    "lora": Method(prepare=_adapter(ConvLoraConfig)),
    "lora-fa": Method(prepare=_adapter(ConvLoraConfig, freeze_a=True)),
    "dora": Method(prepare=_adapter(ConvLoraConfig, use_dora=True)),
    "conv-adapter": Method(prepare=_adapter(ConvAdapterConfig), section="conv_adapter"),
    "galore": Method(prepare=_everything, section="galore", optimizer=_galore_optimizer, saves_full_model=True),
    "peft-lora": Method(prepare=_peft(LoraConfig, _PEFT_LORA)),
    "peft-dora": Method(prepare=_peft(LoraConfig, _PEFT_LORA, use_dora=True)),
    "peft-loha": Method(prepare=_peft(LoHaConfig, _PEFT_LYCORIS)),
    "peft-lokr": Method(prepare=_peft(LoKrConfig, _PEFT_LYCORIS)),
}
"""By name. All but `none` and `norm-stats` train the head; all but `none` have BatchNorm as a part of the update."""


CHOICES: dict[str, Mapping[str, Any]] = {"method": METHODS, "training.optimizer": OPTIMIZERS}
"""The keys of a configuration whose values stand here, for `load_config` to check."""


def memory_format(model: nn.Module) -> torch.memory_format:
    """The format to train and evaluate in: channels_last, but for PEFT's own DoRA, which cannot compute in it."""
    configs = getattr(model, "peft_config", {}).values()
    is_their_dora = any(config.peft_type == PeftType.LORA and config.use_dora for config in configs)
    return torch.contiguous_format if is_their_dora else torch.channels_last


def find_method(name: str) -> Method:
    """Returns `METHODS[name]`.

    Raises:
        ValueError: There is no such method; the message names the nearest.
    """
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown method {name!r}; the nearest is {nearest!r}. There are: {', '.join(METHODS)}")
    return METHODS[name]
