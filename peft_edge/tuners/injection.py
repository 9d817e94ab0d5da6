"""Inject adapters into a network, with two additions to PEFT's injection.

A role name in `target_modules`, such as `all-conv`, is replaced by the names of the modules with this role. The
BatchNorm layers are adapted, too.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from peft_edge._compat import BatchNorm, is_excluded
from peft_edge.roles import ROLES, is_convolution, modules_with_role
from peft_edge.tuners.adapted_layer import AdaptedLayer, check_plain
from peft_edge.tuners.norm import BatchNormLayer


class TargetModule(NamedTuple):
    """A module of the base model, and its place in the adapted model.

    `base` is the module, and `name` is its name in the base model. In the adapted model, the attribute `child_name` of
    `parent` is `module`. `module` is the tuner layer around `base`, or `base` itself if `base` is not adapted.
    """

    name: str
    parent: nn.Module
    child_name: str
    module: nn.Module
    base: nn.Module


def iter_target_modules(model: nn.Module, prefix: str = "") -> Iterator[TargetModule]:
    """Yield each module of the base model, except modules in `modules_to_save`.

    `prefix` is added to the start of each name. A module that is registered more than once is yielded once, with its
    first name.
    """
    yield from _iter_modules(model, prefix, set())


def _iter_modules(model: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[TargetModule]:
    for child_name, child in model.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper) or child in seen:
            continue
        seen.add(child)
        base = child
        while isinstance(base, BaseTunerLayer):
            base = base.base_layer
        yield TargetModule(f"{prefix}{child_name}", model, child_name, child, base)
        yield from _iter_modules(base, f"{prefix}{child_name}.", seen)


def iter_target_norms(config: PeftConfig, model: nn.Module) -> Iterator[TargetModule]:
    """Yield the BatchNorm layers that have running statistics and are not in `config.exclude_modules`."""
    for target in iter_target_modules(model):
        has_statistics = isinstance(target.base, BatchNorm) and target.base.running_mean is not None
        if has_statistics and not is_excluded(config, target.name):
            yield target


def resolve_roles(config: PeftConfig, model: nn.Module) -> None:
    """Replace role names in `config.target_modules` by the names of the modules with these roles.

    A role selects convolutions by their shape or place. For example, `all-conv` selects all convolutions. PEFT compares
    a name with the ends of module names, so a name may also match modules without the role. In this case,
    `target_modules` becomes a regular expression that matches only the modules with the roles, and the modules that the
    user has named.

    Raises:
        NoMatchingPeftModuleError: If all entries of `target_modules` are role names, and no module has any of these
            roles.
        ValueError: If an entry matches no module and is spelt almost like a role name.
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
        # PEFT applies `layers_to_transform` only to targets that are the end of a module name, not the full name.
        by_end = [name.rpartition(".")[2] for name in with_role]
        with_role &= set(_matches(replace(config, target_modules=by_end), keys))
    named = [target for target in config.target_modules if target not in roles]
    wanted = with_role.union(_matches(replace(config, target_modules=named), keys))
    config.target_modules = {*named, *with_role}
    if wanted != with_role.union(_matches(config, keys)):
        # In PEFT, the name `conv1` also matches the module `block.conv1`, but a regular expression must match the full
        # name.
        if selects_layers:
            config.layers_to_transform = config.layers_pattern = None
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))


def _check_spelling(config: PeftConfig, keys: list[str], ends: set[str]) -> None:
    """Raise a `ValueError` if `target_modules` contains a misspelt role name, such as `al-conv`.

    If another entry of `target_modules` matches a module, PEFT ignores the misspelt name without an error.
    """
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
    """Return the end of the error message for targets that match no module.

    It contains the targets, all role names, and the names that are most similar to the targets.
    """
    targets = config.target_modules or []
    names = [name for name, _ in model.named_modules() if name]
    known = [*ROLES, *{name.rpartition(".")[2] for name in names}, *names]
    wanted = [targets] if isinstance(targets, str) else sorted(set(targets) - set(known))
    close = [match for target in wanted for match in difflib.get_close_matches(target, known, n=1)]
    question = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Found target_modules={config.target_modules}; the layer roles are {', '.join(ROLES)}.{question}"


def places_of_modules(model: nn.Module) -> dict[nn.Module, set[tuple[nn.Module, str]]]:
    """Return a dict from each module to the places where it is registered, as pairs (parent, attribute name).

    A module that is shared has several places. `named_modules` yields only the first one.
    """
    places: dict[nn.Module, set[tuple[nn.Module, str]]] = defaultdict(set)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places[child].add((parent, name))
    return places


def check_ties(config: PeftConfig, model: nn.Module) -> None:
    """Check that no layer that will be adapted shares a tensor with another module.

    Merging an adapter into a shared tensor would change both modules.

    Raises:
        ValueError: If a convolution or norm that will be adapted shares a tensor. If a module in `modules_to_save` is
            registered more than once and `config.ensure_weight_tying` is not set.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    places = places_of_modules(model)
    for name, module in model.named_modules():
        for tensor_name in ("weight", "bias", "running_mean", "running_var"):
            tensor = {**module._parameters, **module._buffers}.get(tensor_name)
            if tensor is not None:
                owners[id(tensor)].append(f"{name}.{tensor_name}")
    for target in iter_target_modules(model):
        is_norm = isinstance(target.base, BatchNorm) and not is_excluded(config, target.name)
        is_conv = is_convolution(target.base) and check_target_module_exists(config, target.name)
        for tensor in (*target.base._parameters.values(), *target.base._buffers.values()) if is_norm or is_conv else ():
            if tensor is not None and len(names := owners[id(tensor)]) > 1:
                raise ValueError(
                    f"Cannot adapt layer {target.name!r}: {' and '.join(names)} are one tensor, which a merged adapter "
                    "would change in both places. Give each its own copy before you adapt the network, or leave the "
                    f"layer out with exclude_modules=[{target.name!r}]."
                )
    if getattr(config, "ensure_weight_tying", False):
        return
    for name, module in list(model.named_modules()):
        is_saved = any(name.endswith(target) for target in getattr(config, "modules_to_save", None) or ())
        if is_saved and name and len(places[module]) > 1:
            raise ValueError(
                f"modules_to_save: {name!r} is in {len(places[module])} places of the network, and the adapter would "
                "train a copy for one of them. Give each place its own module before you adapt the network."
            )


def resolve_modules_to_save(config: PeftConfig, model: nn.Module) -> None:
    """Rewrite `config.modules_to_save` so that it matches no module inside another matched module.

    PEFT matches the ends of module names. For example, the entry `classifier` matches both a module `classifier` and
    its submodule `classifier.low_classifier`. PEFT would save this submodule twice, and could not load the adapter. To
    avoid this, the names of the child modules of `classifier` replace the entry.

    Raises:
        ValueError: If a module that must be replaced by its child modules has tensors of its own, or if the names of
            its child modules match further modules.
    """
    ends = tuple(getattr(config, "modules_to_save", None) or ())
    bases = {name: base for name, *_, base in iter_target_modules(model)}
    matched = {name for name in bases if name.endswith(ends)} if ends else set()

    def is_outside(name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in matched)

    outer = {name for name in matched if is_outside(name)}
    if not outer:
        return
    parts, pending = matched - {name for name in matched if any(name.startswith(f"{top}.") for top in outer)}, outer
    parts -= outer
    while pending:
        name = pending.pop()
        if not is_outside(name) and name not in outer:
            has_tensors = any(True for _ in bases[name].parameters()) or any(True for _ in bases[name].buffers())
            parts |= {name} if has_tensors else set()
            continue
        own = [*bases[name].parameters(recurse=False), *bases[name].buffers(recurse=False)]
        children = {f"{name}.{child}" for child, _ in bases[name].named_children()}
        if own or not children <= bases.keys():
            raise ValueError(
                f"modules_to_save: {name!r} has tensors of its own, and parts whose names end in the same way. PEFT "
                "would save these parts twice. Name the parts of the module instead."
            )
        outer = outer - {name}
        pending = pending | children
    if {name for name in bases if name.endswith(tuple(parts))} != parts:
        raise ValueError(
            f"modules_to_save={list(ends)}: modules inside these modules have names with the same ends, and so do the "
            f"parts {sorted(parts)}. Rename the modules, or choose others."
        )
    config.modules_to_save = sorted(parts)


def warn_of_unmatched_names(config: PeftConfig, model: nn.Module) -> None:
    """Warn about names in `target_modules` and `modules_to_save` that match no module. PEFT ignores such names."""
    keys = {name for name, _ in model.named_modules(remove_duplicate=False)}  # a shared module has several names
    keys |= {target.name for target in iter_target_modules(model)}
    targets = config.target_modules
    wanted = [] if targets is None or isinstance(targets, str) else sorted(set(targets) - set(ROLES))
    found = [("target_modules", name, any(f".{key}".endswith(f".{name}") for key in keys)) for name in wanted]
    if config.task_type is None:  # with a task type, PEFT adds names of heads, which the network may not have
        saved = getattr(config, "modules_to_save", None) or ()
        found += [("modules_to_save", name, any(key.endswith(name) for key in keys)) for name in saved]
    for field, name, has_module in found:
        if not has_module:
            ends = {key.rpartition(".")[2] for key in keys}
            close = difflib.get_close_matches(name, [*ends, *keys], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"{field}: no module is called {name!r}, so it has no effect.{hint}", stacklevel=2)


def warn_of_unsaved_norms(model: nn.Module) -> None:
    """Warn about norms that are not adapted, but have running statistics, which change in training mode.

    Adapters are saved without these statistics.
    """
    names = [
        target.name
        for target in iter_target_modules(model)
        if target.module is target.base
        and isinstance(target.base, (BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
        and target.base.running_mean is not None
    ]
    if names:
        warnings.warn(
            f"The running statistics of {names} are not part of the adapter: training mode changes them, and they are "
            "not saved. Save these layers whole with modules_to_save, or call `eval()` on them after each `train()`.",
            stacklevel=2,
        )


@contextmanager
def unchanged_on_error(model: nn.Module, tuner: Injection, config: PeftConfig) -> Iterator[None]:
    """If the code in the context raises an error, restore the model, the tuner and the configuration."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    attributes = [(vars(config), dict(vars(config)))]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            # Copy the dictionaries in which PEFT's layers store their adapters. Leave out nn.Module's own dictionaries,
            # whose names start with "_".
            own = {key: copy.copy(value) for key, value in vars(module).items() if key == "_active_adapter"}
            own |= {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict) and not k.startswith("_")}
            attributes.append((vars(module), own))
    targets = list(tuner.targeted_module_names)
    try:
        yield
    except BaseException:
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for values, before in attributes:
            values.update(before)
        tuner.targeted_module_names[:] = targets
        for layer in model.modules():
            if isinstance(layer, BatchNormLayer):
                layer.intercept_reset()
        raise


class Injection(BaseTuner):
    """Base class of the tuner models in this package.

    Before PEFT injects an adapter, this class replaces role names such as `all-conv` in `target_modules` by module
    names. After the injection, it adapts the BatchNorm layers.
    """

    config_class: type[PeftConfig]
    """The configuration class of the tuner.

    In a `PeftMixedModel`, PEFT's own code injects the adapters that have another configuration class.
    """

    _shared: Mapping[nn.Module, set[tuple[nn.Module, str]]] = MappingProxyType({})
    """A mapping from each module that is registered more than once to its places, see `places_of_modules`.

    The mapping is set only while adapters are injected or unloaded. At all other times, it is empty.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Inject an adapter into `model`. An error leaves the model unchanged.

        Raises:
            NoMatchingPeftModuleError: If no module matches `target_modules`.
            ValueError: If a matching module cannot be adapted, or if `adapter_name` is empty or contains a dot.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_class):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        with unchanged_on_error(model, self, config), self._shared_modules(model):
            self._inject(config, model, adapter_name, *args, **kwargs)
        warn_of_unmatched_names(config, model)
        warn_of_unsaved_norms(model)

    def _inject(self, config: PeftConfig, model: nn.Module, adapter_name: str, *args: object, **kwargs: object) -> None:
        if not adapter_name or "." in adapter_name:
            raise ValueError(f"The name of an adapter must be non-empty and have no dot, found {adapter_name!r}.")
        # If target_modules is None, this call sets PEFT's default for the architecture, or raises if there is none.
        self._prepare_adapter_config(config, self.get_model_config(model))
        resolve_modules_to_save(config, model)
        resolve_roles(config, model)
        norms = list(iter_target_norms(config, model))
        for target in norms:
            check_plain(target.base, target.name)
        for target in iter_target_modules(model):
            if isinstance(target.base, BatchNorm) and check_target_module_exists(config, target.name):
                _check_has_statistics(target)
        self._check_targets(config, model)
        check_ties(config, model)
        merged = [m for m in model.modules() if isinstance(m, AdaptedLayer) and m.merged]
        if merged:
            # A new DoRA or BatchNorm adapter copies values of the base layer. These values must not contain a merged
            # adapter.
            warnings.warn("Unmerging the adapters of this model before another one is added.", stacklevel=2)
            for layer in merged:
                layer.unmerge()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {_suggest_targets(config, model)}") from error
        # The norms are not added to target_modules, so the saved configuration contains only the targets of the user.
        for name, parent, child_name, *_ in norms:
            # Usually, `layer` is the norm itself. It is an adapted layer if the norm already has an adapter, or if
            # `target_modules` matches the norm.
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
        # A module may be in several places of the network. PEFT replaces it in only one of them.
        places = self._shared.get(child, {(parent, child_name)})
        if is_unwrapped and isinstance(child, BatchNormLayer):
            child.release_base_layer()
        if not (isinstance(new_module, AdaptedLayer) or is_unwrapped):
            super()._replace_module(parent, child_name, new_module, child)
        # PEFT's method moves a new layer to the device of the old layer's weight. It is not called for the layers of
        # this package, because they create their adapters on the right device, and because a BatchNorm or a block may
        # have no weight.
        for module, name in places:
            setattr(module, name, new_module)
        # A new layer starts in training mode. If the model is in eval mode, the layer must not use dropout or batch
        # statistics.
        new_module.train(child.training)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # If a module is in several places, PEFT saves its tensors under one name. When PEFT loads the file, it would
        # report the other names as missing keys.
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tensors = model.state_dict(keep_vars=True)
        loaded = {id(tensors[key]): value for key, value in mapped.items() if key in tensors}
        return mapped | {key: loaded[id(tensor)] for key, tensor in tensors.items() if id(tensor) in loaded}

    @contextmanager
    def _shared_modules(self, model: nn.Module) -> Iterator[None]:
        places = places_of_modules(model)
        self._shared = {module: found for module, found in places.items() if len(found) > 1}
        try:
            yield
        finally:
            del self._shared

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, by default the active ones, into the base layers. An error leaves the model unchanged.

        Raises:
            ValueError: If `safe_merge` is True and a merged value is not finite, or if a base layer computes its weight
                in each forward pass (pruning, parametrisation).
            RuntimeError: If an adapter has a bias and the base layer has none.
            NotImplementedError: If an adapter of a `ConvAdapterModel` cannot be merged.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise any error that merging would raise. No layer changes."""
        for layer in self.model.modules():
            if isinstance(layer, AdaptedLayer):
                names = layer.active_adapters if adapter_names is None else adapter_names
                new = [name for name in names if name in layer._adapters and name not in layer.merged_adapters]
                if new:
                    with onload_layer(layer):
                        layer.check_merge(new, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        with _hidden_base_layers(self.model), self._shared_modules(self.model):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers.

        PEFT's method skips each layer whose module path contains `self.prefix`. To skip no layer, this method
        temporarily sets `prefix` to a string that no path contains.
        """
        self.prefix = "\0"
        try:
            super().delete_adapter(adapter_name)
        finally:
            del self.prefix


def _check_has_statistics(target: TargetModule) -> None:
    if target.base.running_mean is None:
        raise ValueError(
            f"Cannot adapt layer {target.name!r}: {type(target.base).__name__} has no running statistics "
            f"(track_running_stats=False). Leave it out with exclude_modules=[{target.name!r}]."
        )


@contextmanager
def _hidden_base_layers(model: nn.Module) -> Iterator[None]:
    """Within the context, rename child modules that are called `base_layer` but do not belong to a tuner layer.

    timm's DLA has such children. PEFT would treat their parent modules as adapted layers.
    """
    parents = [m for m in model.modules() if "base_layer" in m._modules and not isinstance(m, BaseTunerLayer)]
    _rename_child(parents, "base_layer", "base_layer_")
    try:
        yield
    finally:
        _rename_child(parents, "base_layer_", "base_layer")


def _rename_child(parents: list[nn.Module], old: str, new: str) -> None:
    for parent in parents:
        children = {new if name == old else name: child for name, child in parent._modules.items()}
        parent._modules.clear()
        parent._modules.update(children)


@contextmanager
def pass_adapter_names(model: nn.Module, adapter_names: list[str] | None) -> Iterator[None]:
    """Within the context, use one adapter per sample: sample i of a batch uses the adapter `adapter_names[i]`.

    All adapted layers and the modules in `modules_to_save` receive `adapter_names` as an argument. In this list,
    `"__base__"` selects the base model. If `adapter_names` is None, nothing changes. PEFT's own implementation in
    `peft.LoraModel` leaves out BatchNorm layers.

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
    """Return a dict from name to parameter of the base model, without the parameters of modules in `modules_to_save`.

    The names are those in the base model before it was adapted.
    """
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


def base_fingerprint(model: PeftModel) -> dict[str, str] | None:
    """Return a dict with two SHA-256 hashes of the base model, with the keys `parameters` and `statistics`.

    `parameters` is a hash of the names, shapes, dtypes and values of `base_parameters`. `statistics` is a hash of the
    running statistics of the frozen BatchNorm layers. A BatchNorm layer is frozen if its active adapter has
    `norm="frozen"`. If no BatchNorm layer is frozen, the key `statistics` is missing. All other statistics are not
    hashed, because an adapter replaces them, or training may change them.

    The result is None if an adapter is merged, or if the initialisation of an adapter may change base parameters, as
    PiSSA does. In both cases, the base parameters may differ from those that were loaded.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    initial = {getattr(config, "init_lora_weights", True) for config in model.peft_config.values()}
    if any(layer.merged for layer in layers) or not initial <= {True, False, "gaussian"}:
        return None
    statistics = {
        f"{target.name}.{name}": getattr(target.base, name)
        for target in iter_target_modules(model.get_base_model())
        if isinstance(target.module, BatchNormLayer) and target.module.current_state().running_mean is None
        for name in ("running_mean", "running_var")
    }
    return {"parameters": _hash(base_parameters(model))} | ({"statistics": _hash(statistics)} if statistics else {})


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
