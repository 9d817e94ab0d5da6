"""Makes a model lean, and plain again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TypeVar, get_args

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_edge.lean.dataflow import PRODUCT, consumers
from peft_edge.lean.folding import FoldedNorm, Slot, base_layer
from peft_edge.lean.layers import LEAN, PLAIN, LeanBatchNorm, LeanClippedActivation, LeanConvolution, Masks

Model = TypeVar("Model", bound=nn.Module)

_ADDED = ("folded_norm", "recompute", "masks", "consumers", "feeds_product")


def prepare_model_for_lean_training(
    model: Model, *, fold_norm: bool = False, masks: Masks = "byte", recompute: bool = False
) -> Model:
    """Makes the frozen layers of a convolutional network keep for the backward pass only what it needs.

    Outputs and gradients stay what they are, the latter to rounding. A frozen convolution keeps nothing of its input, a
    frozen BatchNorm nothing at all, ReLU and its kin a mask, or the output where the next layer keeps that anyway. What
    is trained, and layers that are not known, stay as they are: `lean_summary` tells. PEFT's `get_peft_model` may come
    before or after, and weights, statistics, adapters and modes may change at any time; checkpoints are the same.

    Args:
        model: any model of `Conv1d`, `2d` or `3d`, BatchNorm and activations, such as timm's; changed in place.
        fold_norm: let a frozen BatchNorm write over the output of the convolution before it, where nothing else takes
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
    taken_by = _consumers(model, is_needed=fold_norm)
    undo_lean_training(model)
    for module in model.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
    slots = {name: Slot(model, name) for name, _ in model.named_modules()}
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
    for pair in _foldable(model, taken_by, slots) if fold_norm else ():
        base_layer(pair.conv.module).folded_norm = pair
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
                f"fold_norm=True needs to see which layer takes which output, and {type(model).__name__} does not run "
                f"on images of shapes alone ({type(error).__name__}: {error}): leave fold_norm out"
            ) from error
        # Without, activations keep masks also where the next layer keeps their output.
        return {}


def _foldable(model: nn.Module, taken_by: Mapping[str, list[str]], slots: Mapping[str, Slot]) -> Iterator[FoldedNorm]:
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
                yield FoldedNorm(slots[name], slots[names[0]])
