"""Register the adaptation methods. Each method prepares a source model for training and chooses its optimizer."""

from __future__ import annotations

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

from peft_edge import optim
from peft_edge.backbones import head_names
from peft_edge.names import did_you_mean
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
"""A dict from names to optimizer constructors. `adafactor` is the Adafactor of Transformers without its own learning
rate schedule."""

_GALORE: dict[str, OptimizerFactory] = {
    "adamw": optim.GaLoreAdamW,
    "sgd": partial(optim.GaLoreSGD, momentum=0.0),
    "sgd-momentum": optim.GaLoreSGD,
    "adafactor": optim.GaLoreAdafactor,
}


def _plain_optimizer(model: nn.Module, name: str, options: Options, *, lr: float, weight_decay: float) -> Optimizer:
    return OPTIMIZERS[name](optim.decay_groups(model, weight_decay), lr=lr)


def _galore_optimizer(model: nn.Module, name: str, options: Options, *, lr: float, weight_decay: float) -> Optimizer:
    names = ("rank", "update_proj_gap", "scale", "proj_type", "target_modules")
    # `target_modules` contains module names of the backbone, without the prefix that PEFT adds to module names.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    groups = optim.galore_param_groups(base, weight_decay=weight_decay, **{key: options[key] for key in names})
    optimizer = _GALORE[name](groups, lr=lr)
    if options["layerwise"]:
        optim.update_in_backward(optimizer)
    return optimizer


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to adapt a model. To add a method to train.py, add an entry to `METHODS`.

    >>> def last_block(model, options):
    ...     model.requires_grad_(False)
    ...     model.blocks[-1].requires_grad_(True)
    ...     return model
    >>> METHODS["last-block"] = Method(prepare=last_block, section=None, saves_full_model=True)
    >>> find_method("last-block").saves_full_model
    True
    >>> del METHODS["last-block"]
    """

    prepare: Prepare
    """A function that takes a timm model and the options, and returns the model to train. It may change the timm model
    in place."""

    section: str | None = "adapter"
    """The configuration section whose keys are options of the method. Every method also has the option `norm`, which
    states how BatchNorm layers are treated. If `section` is None, `norm` is the only option."""

    optimizer: OptimizerFactory | None = _plain_optimizer
    """A function that takes the prepared model, a key of `OPTIMIZERS`, the options, and the keywords `lr` and
    `weight_decay`, and returns the optimizer. None if the method uses no gradients."""

    saves_full_model: bool = False
    """Whether to save the whole model instead of a PEFT adapter. Must be True if the method also trains weights that
    the adapter does not contain."""


def _adapter(config: type[PeftConfig], **fixed: object) -> Prepare:
    def prepare(model: nn.Module, options: Options) -> nn.Module:
        return get_peft_model(model, config(**options, **fixed, modules_to_save=head_names(model)))

    return prepare


def _no_layers(*, saves_head: bool = True, **fixed: object) -> Prepare:
    """Return a `prepare` function that adapts no convolution. It adapts BatchNorm according to the option `norm`.

    If `saves_head` is True, the head is trained and saved with the adapter. `fixed` are further arguments of
    `ConvLoraConfig`. If `fixed` contains `norm`, its value replaces the option `norm`.
    """

    def prepare(model: nn.Module, options: Options) -> nn.Module:
        settings = {"norm": options["norm"], "modules_to_save": head_names(model) if saves_head else None, **fixed}
        return get_peft_model(model, ConvLoraConfig(target_modules=DUMMY_TARGET_MODULES, **settings))

    return prepare


def _everything(model: nn.Module, options: Options) -> nn.Module:
    # With the norm mode `affine`, an adapter would train copies of BatchNorm's weights and biases. These copies are not
    # needed, because `requires_grad_(True)` makes the original weights and biases trainable.
    norm = "stats" if options["norm"] == "affine" else options["norm"]
    return _no_layers(saves_head=False)(model, {"norm": norm}).requires_grad_(True)


def _eval_mode(norm: nn.Module, inputs: object) -> None:
    """Put a BatchNorm into eval mode before its forward pass, because `model.train()` has put it into train mode."""
    norm.eval()


def _peft(config: type[PeftConfig], names: Mapping[str, str], **fixed: object) -> Prepare:
    """Return a `prepare` function for one of PEFT's own adapters.

    Unless the option `norm` is `frozen`, all BatchNorm layers are saved with the adapter. `names` is a dict from keys
    of the configuration section `adapter` to the names of the corresponding arguments of `config`. `fixed` are further
    arguments of `config`.
    """

    def prepare(model: nn.Module, options: Options) -> nn.Module:
        norm, targets = options["norm"], options["target_modules"]
        if norm == "recalibrate":
            raise ValueError(
                "norm: 'recalibrate' does not work with PEFT's own adapters, which have no statistics of their own: "
                "choose frozen, stats or affine, or a method without peft- in its name"
            )
        if targets in ROLES:
            targets = "|".join(map(re.escape, modules_with_role(model, targets)))
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        norms = [name for name, module in model.named_modules() if isinstance(module, batch_norm)]
        settings = {theirs: options[ours] for ours, theirs in names.items()}
        saved = [*head_names(model), *(norms if norm != "frozen" else ())]
        settings |= {"target_modules": targets, "modules_to_save": saved, **fixed}
        try:
            adapted = get_peft_model(model, config(**settings))
        except ValueError as error:
            raise ValueError(
                f"PEFT's own {config.__name__} does not fit this backbone: {error} To leave out grouped convolutions, "
                "set adapter.target_modules=dense"
            ) from error
        for name in norms if norm != "affine" else ():
            module = adapted.base_model.model.get_submodule(name).requires_grad_(False)
            if norm == "frozen":
                module.register_forward_pre_hook(_eval_mode)
        return adapted

    return prepare


_PEFT_LORA = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_PEFT_LYCORIS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "rank_dropout"}

METHODS: dict[str, Method] = {
    "none": Method(prepare=lambda model, _: model.requires_grad_(False), section=None, optimizer=None),
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
"""All methods by name. The head is trainable in all methods except `none` and `norm-stats`."""


def find_method(name: str) -> Method:
    """Return the method with this name.

    Raises:
        ValueError: If `METHODS` does not contain the name. The message suggests a similar name, if there is one.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise ValueError(f"unknown method {name!r}: expected one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def training_memory_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format for training a model: channels_last, except for a model with PEFT's own DoRA.

    The forward pass of PEFT's DoRA fails in channels_last, so the result for such a model is contiguous_format.
    """
    configs = getattr(model, "peft_config", {}).values()
    is_peft_dora = any(config.peft_type == PeftType.LORA and config.use_dora for config in configs)
    return torch.contiguous_format if is_peft_dora else torch.channels_last
