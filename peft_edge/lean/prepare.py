"""Which layers take a layer's output: seen while the model runs once on shapes.

Makes a model lean, and plain again.

What each layer of a model keeps for the backward pass.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from peft_edge.lean.inplace_norm import InplaceNorm, ModuleRef, base_layer, inplace_norms
from peft_edge.lean.layers import LEAN, PLAIN, LeanBatchNorm, LeanClippedActivation, LeanConvolution, Masks

_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}

PRODUCT = "*"
"""A consumer that is no layer but a product."""
FUNCTION = ""
"""Any other consumer that is no layer: a function that the model calls, or whoever takes the model's own output."""


def consumers(model: nn.Module, *, training: bool = False, intermediates: bool = False) -> Mapping[str, list[str]]:
    """Runs a copy of the model on the meta device, and returns who takes each layer's output.

    A layer is a module without modules inside, a norm, or one that PEFT has put into the model. For each, by its name,
    there is one entry for every time that its output is taken: a layer's name, `PRODUCT` or `FUNCTION`. An activation
    inside a norm takes the norm's place.

    Args:
        model: takes images.
        training: whether it runs as in training.
        intermediates: whether timm's `forward_intermediates` runs instead of `forward`.

    Raises:
        Exception: what the model raises that cannot run so.
    """
    traced: Any = copy.deepcopy(model).to("meta").train(training)
    trace = _Trace()
    for name, module in traced.named_modules():
        if _is_layer(module):
            module.register_forward_pre_hook(trace.enter(name), with_kwargs=True)
            module.register_forward_hook(trace.leave(name), always_call=True)
    with torch.no_grad(), trace:
        run = traced.forward_intermediates if intermediates else traced
        trace.take(run(_images(traced)), FUNCTION)
    return trace.consumers


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Identity):
        # What it returns is what it was given.
        return False
    return isinstance(module, (_BatchNorm, BaseTunerLayer)) or not any(True for _ in module.children())


def _images(model: nn.Module) -> Tensor:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d))
        size = (conv.in_channels, *[224] * len(conv.kernel_size))
    return torch.empty(2, *size, device="meta", dtype=next(model.parameters()).dtype)


class _Trace(TorchFunctionMode):
    """Marks each layer's output with the layer's name, and notes who is given what is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers: defaultdict[str, list[str]] = defaultdict(list)
        self._layers: list[str] = []

    def take(self, values: Any, consumer: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (producer := getattr(value, "_made_by", None)) is not None:
                self.consumers[producer].append(consumer)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.take((args, kwargs), name)
            self._layers.append(name)

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._layers.pop()
            if isinstance(output, Tensor) and not _is_activation_inside(output, module, name):
                output._made_by = name  # type: ignore[attr-defined]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not self._layers:
            self.take((args, kwargs), PRODUCT if func.__name__ in _PRODUCTS else FUNCTION)
            result._made_by = None  # type: ignore[attr-defined]
        return result


def _is_activation_inside(output: Tensor, module: nn.Module, name: str) -> bool:
    """Whether a norm's output is what the activation inside of it has made."""
    return isinstance(base_layer(module), _BatchNorm) and (getattr(output, "_made_by", None) or "").startswith(
        f"{name}."
    )


Model = TypeVar("Model", bound=nn.Module)

_ADDED = ("inplace_pair", "recompute", "masks", "consumers", "feeds_product")


def prepare_model_for_lean_training(
    model: Model, *, inplace_norm: bool = False, masks: Masks = "byte", recompute: bool = False
) -> Model:
    """Makes the frozen layers of a convolutional network keep for the backward pass only what it needs.

    Outputs and gradients stay what they are, the latter to rounding. A frozen convolution keeps nothing of its input, a
    frozen BatchNorm nothing at all, ReLU and its kin a mask, or the output where the next layer keeps that anyway. What
    is trained, and layers that are not known, stay as they are: `lean_summary` tells. PEFT's `get_peft_model` may come
    before or after, and weights, statistics, adapters and modes may change at any time; checkpoints are the same.

    Args:
        model: any model of `Conv1d`, `2d` or `3d`, BatchNorm and activations, such as timm's; changed in place.
        inplace_norm: let a frozen BatchNorm write over the output of the convolution before it, where nothing else takes
            that: no map of its own. Neither layer changes, so adapters stay valid without it. What takes an output
            shows in a run of the model: who stores it by other means, such as an attribute, finds it normalised.
        masks: a byte or a bit for each element, which takes a little longer; `"off"` keeps outputs.
        recompute: of adapted convolutions of at most 96 products an output (depthwise ones, the first one, those of
            few channels), which keep their input, let the next adapted layer make its own input from that again.

    Returns:
        The model. `undo_lean_training` makes it plain again.

    Raises:
        ValueError: `masks` is unknown, or the model does not run on images, so that what could be folded is not seen.
    """
    if masks not in get_args(Masks):
        raise ValueError(f"masks is {masks!r}, expected one of: {', '.join(get_args(Masks))}")
    taken_by = _consumers(model, is_needed=inplace_norm)
    undo_lean_training(model)
    for module in model.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
    slots = {name: ModuleRef(model, name) for name, _ in model.named_modules()}
    for name, names in taken_by.items():
        layer = slots[name].module
        if isinstance(layer, LeanClippedActivation):
            layer.consumers = tuple(slots[consumer] for consumer in names if consumer in slots)
            layer.feeds_product = PRODUCT in names
    for module in model.modules():
        if isinstance(module, LeanClippedActivation):
            module.masks = masks
        elif isinstance(module, LeanConvolution):
            module.recompute = recompute
    for pair in _inplace_pairs(model, taken_by, slots) if inplace_norm else ():
        base_layer(pair.conv.module).inplace_pair = pair
    return model


def undo_lean_training(model: Model) -> Model:
    """Makes the lean layers of a model plain again, and returns it."""
    for module in model.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
            for name in _ADDED:
                vars(module).pop(name, None)
    return model


def _consumers(model: nn.Module, *, is_needed: bool) -> Mapping[str, list[str]]:
    try:
        return consumers(model)
    except Exception as error:
        if is_needed:
            raise ValueError(
                f"inplace_norm=True needs to see which layer takes which output, and {type(model).__name__} does not run "
                f"on images of shapes alone ({type(error).__name__}: {error}): leave inplace_norm out"
            ) from error
        # Without, activations keep masks also where the next layer keeps their output.
        return {}


def _inplace_pairs(
    model: nn.Module, taken_by: Mapping[str, list[str]], slots: Mapping[str, ModuleRef]
) -> Iterator[InplaceNorm]:
    """The convolutions whose output one norm takes and nothing else, and whose output is all that the norm takes."""
    inputs = Counter(consumer for names in taken_by.values() for consumer in names)
    # Other ways to run it take what this one does not.
    others = [consumers(model, training=True)]
    if hasattr(model, "forward_intermediates"):
        with suppress(Exception):  # another method of that name
            others.append(consumers(model, intermediates=True))
    # Which of these copies runs depends on the active adapter.
    switched = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    for name, names in taken_by.items():
        is_alone = len(names) == 1 == inputs[names[0]] and all(other.get(name, names) == names for other in others)
        if is_alone and names[0] in slots and not names[0].startswith(switched) and not name.startswith(switched):
            conv, norm = base_layer(slots[name].module), base_layer(slots[names[0]].module)
            if isinstance(conv, LeanConvolution) and isinstance(norm, LeanBatchNorm):
                yield InplaceNorm(slots[name], slots[names[0]])


def lean_summary(model: nn.Module) -> str:
    """A table of the layers of a model by kind, with what they keep for the backward pass as things stand.

    Layers that `prepare_model_for_lean_training` does not know have "what torch keeps", with the name of the first one.

    Args:
        model: with adapters or without, lean or plain.
    """
    rows: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    folded = {base_layer(layers[1]) for pair in inplace_norms(model) if (layers := pair.layers()) is not None}
    for name, layer in _layers(model):
        base = base_layer(layer)
        kind = PLAIN.get(type(base), type(base)).__name__
        row = (f"{kind} in {type(layer).__name__}" if layer is not base else kind, _kept(layer, folded))
        rows[row] += 1
        first.setdefault(row, name)
    width = max(len(kind) for kind, _ in rows)
    return "\n".join(
        f"{count:5d}  {kind.ljust(width)}  {kept}" + (f", such as {first[kind, kept]}" if kept == _UNKNOWN else "")
        for (kind, kept), count in sorted(rows.items())
    )


_UNKNOWN = "what torch keeps"


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        base = base_layer(child)
        is_layer = child is not base or isinstance(base, _BatchNorm) or not any(True for _ in base.children())
        if is_layer and not isinstance(child, nn.Identity):
            yield path, child
        # A norm of timm's has an activation inside; of an adapted layer only that is another layer.
        yield from _layers(base, f"{path}.")


def _kept(layer: nn.Module, folded: Collection[nn.Module]) -> str:
    base = base_layer(layer)
    if isinstance(base, LeanClippedActivation):
        kept = base.kept()
        return "its output" if kept == "output" else f"a {kept} for each element"
    keeps_input = getattr(layer, "keeps_input", None)
    if keeps_input is None:
        return _UNKNOWN
    if keeps_input:
        return "its input"
    return "nothing, and works in place" if base in folded else "nothing of its input"
