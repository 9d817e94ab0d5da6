"""Inject adapters into a model: resolve layer roles in `target_modules`, and adapt the BatchNorm layers."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from peft_edge._compat import BatchNorm, is_excluded
from peft_edge.roles import ROLES, modules_with_role
from peft_edge.tuners.adapted_layer import AdaptedLayer, check_plain
from peft_edge.tuners.norm import BatchNormLayer


class TargetModule(NamedTuple):
    """A module `base` of the unadapted network, its `name` there, and its place in the adapted network.

    `module` is `parent.<child_name>`: the tuner layer around `base`, or `base` itself if it is not adapted.
    """

    name: str
    parent: nn.Module
    child_name: str
    module: nn.Module
    base: nn.Module


def iter_target_modules(model: nn.Module, prefix: str = "") -> Iterator[TargetModule]:
    """Yield the modules of the unadapted network, except those in `modules_to_save`; names start with `prefix`."""
    for child_name, child in model.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        yield TargetModule(f"{prefix}{child_name}", model, child_name, child, base)
        yield from iter_target_modules(base, f"{prefix}{child_name}.")


def iter_target_norms(config: PeftConfig, model: nn.Module) -> Iterator[TargetModule]:
    """Yield the BatchNorm layers with running statistics that `config` does not exclude."""
    for target in iter_target_modules(model):
        has_statistics = isinstance(target.base, BatchNorm) and target.base.running_mean is not None
        if has_statistics and not is_excluded(config, target.name):
            yield target


def resolve_roles(config: PeftConfig, model: nn.Module) -> None:
    """Replace the layer roles in `config.target_modules` by the names of the modules with these roles.

    Raises:
        NoMatchingPeftModuleError: If all targets are roles, and no module has one of these roles.
        ValueError: If a target is a misspelt role.
    """
    keys = [name for name, _ in model.named_modules() if name]
    ends = {key.rpartition(".")[2] for key in keys}
    _check_spelling(config, keys, ends)
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    roles = set(config.target_modules) & set(ROLES) - ends
    if not roles:
        return
    with_role = {name for role in roles for name in modules_with_role(model, role)}
    if not with_role and roles == set(config.target_modules):
        raise NoMatchingPeftModuleError(
            f"Target modules {sorted(roles)} not found in the base model: {type(model).__name__} has no such "
            "convolution. Choose another role, or use module names."
        )
    selects_layers = getattr(config, "layers_to_transform", None) is not None
    if selects_layers:
        # PEFT applies layers_to_transform only to targets that match the end of a module name.
        by_end = [name.rpartition(".")[2] for name in with_role]
        with_role &= set(_matches(replace(config, target_modules=by_end), keys))
    named = [target for target in config.target_modules if target not in roles]
    wanted = with_role.union(_matches(replace(config, target_modules=named), keys))
    config.target_modules = {*named, *with_role}
    if wanted != with_role.union(_matches(config, keys)):
        # In PEFT, a name without a dot, such as `conv1`, also matches `block.conv1`. A regular expression does not.
        if selects_layers:
            config.layers_to_transform = config.layers_pattern = None
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))


def _check_spelling(config: PeftConfig, keys: list[str], ends: set[str]) -> None:
    """Raise a `ValueError` for a misspelt role. PEFT ignores this role if another target matches."""
    if isinstance(config.target_modules, str):
        unknown = set() if _matches(config, keys) else {config.target_modules}
    else:
        unknown = set(config.target_modules or ()) - {*ROLES, *keys, *ends}
    for target in sorted(unknown):
        if close := difflib.get_close_matches(target, ROLES, n=1, cutoff=0.8):
            raise ValueError(f"target_modules: {target!r} is no layer role and no module; did you mean {close[0]!r}?")


def _matches(config: PeftConfig, keys: list[str]) -> list[str]:
    return [key for key in keys if check_target_module_exists(config, key)]


def _suggest_targets(config: PeftConfig, model: nn.Module) -> str:
    """Return the last part of the error message for targets without a match: the roles, and similar names."""
    targets = config.target_modules or []
    names = [name for name, _ in model.named_modules() if name]
    known = [*ROLES, *{name.rpartition(".")[2] for name in names}, *names]
    wanted = [targets] if isinstance(targets, str) else sorted(set(targets) - set(known))
    close = [match for target in wanted for match in difflib.get_close_matches(target, known, n=1)]
    question = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Found target_modules={config.target_modules}; the layer roles are {', '.join(ROLES)}.{question}"


class Injection(BaseTuner):
    """Base class of our models: resolve layer roles before PEFT's injection, and adapt BatchNorm layers after it."""

    config_class: type[PeftConfig]
    """The class of the tuner's configuration. In a mixed model, PEFT handles all other configurations."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Inject an adapter into `model`.

        Raises:
            NoMatchingPeftModuleError: If no module matches `target_modules`.
            ValueError: If a matching module cannot be adapted. The model is unchanged then.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_class):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        # If target_modules is missing, this fills in PEFT's defaults for the model, or raises PEFT's error.
        self._prepare_adapter_config(config, self.get_model_config(model))
        resolve_roles(config, model)
        norms = list(iter_target_norms(config, model))
        for target in norms:
            check_plain(target.base, target.name)
        self._check_targets(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {_suggest_targets(config, model)}") from error
        # The norms are not added to target_modules, so the saved configuration contains only the targets of the user.
        for name, parent, child_name, *_ in norms:
            # PEFT has just replaced the norm by an adapted layer if target_modules matches it.
            layer = getattr(parent, child_name)
            self._create_and_replace(config, adapter_name, layer, child_name, parent, current_key=name)
            if not isinstance(layer, BatchNormLayer):
                layer = getattr(parent, child_name)
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_targets(self, config: PeftConfig, model: nn.Module) -> None:
        """Raise a `ValueError` if `config` targets a layer that cannot be adapted."""
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        is_unwrapped = isinstance(child, AdaptedLayer) and new_module is child.base_layer
        if isinstance(new_module, AdaptedLayer) or is_unwrapped:
            # PEFT's method would move the new layer to the device of the old layer's weight. A BatchNorm or a block may
            # have no weight, and our layers create their adapters on the right device.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        # A new layer is in training mode. In a model in eval mode it must not use dropout or batch statistics.
        new_module.train(child.training)


@contextmanager
def pass_adapter_names(model: nn.Module, adapter_names: list[str] | None) -> Iterator[None]:
    """Within the context, pass `adapter_names` to every adapted layer: each sample of a batch uses its own adapter.

    The list has one adapter name per sample; `"__base__"` selects the base model. None changes nothing. PEFT's
    implementation in `peft.LoraModel` does not include BatchNorm layers.

    Raises:
        ValueError: If the model is in training mode or has merged adapters, if a name is unknown, or if the number of
            names differs from the batch size.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    known = {"__base__"}.union(*(layer._get_available_adapters() for layer in layers))
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )

    def add_names(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> tuple[object, object]:
        if len(args[0]) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(args[0])} respectively."
            )
        return args, {**kwargs, "adapter_names": adapter_names}

    wrapped = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in wrapped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the unadapted network that adapters and `modules_to_save` do not replace, by name."""
    base = model.get_base_model()
    replaced: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            replaced.append(f"{name}.")
        elif isinstance(module, BaseTunerLayer):
            replaced += [f"{name}.{layer}." for layer in module.adapter_layer_names]
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in base.named_parameters()
        if not name.startswith(tuple(replaced))
    }


def base_fingerprint(model: PeftModel) -> str | None:
    """Return a SHA-256 of `base_parameters`: names, shapes, types and bytes.

    BatchNorm statistics are not part of it, because training may update those of the base. None if the parameters are
    not those that the base was loaded with: an adapter is merged, or its initialisation has changed them (PiSSA).
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    initial = {getattr(config, "init_lora_weights", True) for config in model.peft_config.values()}
    if any(layer.merged for layer in layers) or not initial <= {True, False, "gaussian"}:
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
