"""Replace the layers of a model by lean layers, restore the original layers, and list what each layer saves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_edge._compat import BatchNorm, ConvolutionBase, leaves
from peft_edge.lean.inplace_norm import InplaceNorm, ModuleRef, base_layer, inplace_norms
from peft_edge.lean.layers import (
    LEAN,
    PLAIN,
    Function,
    LeanBatchNorm,
    LeanBlock,
    LeanClippedActivation,
    LeanConvolution,
    Masks,
    Recomputed,
)
from peft_edge.roles import meta_copy

Model = TypeVar("Model", bound=nn.Module)

# Attributes that `prepare_model_for_lean_training` sets on lean layers.
_LEAN_ATTRIBUTES = ("inplace_norm", "recompute", "masks", "consumers", "feeds_product", "split_blocks")


def prepare_model_for_lean_training(
    model: Model,
    *,
    inplace_norm: bool = False,
    masks: Masks = "byte",
    recompute: Recomputed = False,
    split_blocks: bool = False,
    checkpoint: bool = False,
) -> Model:
    """Make the layers of a convolutional network save only what the backward pass needs.

    Outputs are unchanged (bit-identical on a CPU), and gradients are equal up to rounding. BatchNorm in training mode
    or with trainable weights saves its input. The activations, gates and trained convolutions after such a BatchNorm
    save no further feature maps, because the backward pass recomputes their inputs. A frozen convolution saves only its
    kernel. A frozen BatchNorm in eval mode saves one number per channel. A ReLU after such a BatchNorm saves a mask, or
    its output if the next layer saves this output anyway. Layers of classes without a lean version save the same
    tensors as before. The keys and values of the `state_dict` are unchanged.

    After the call, you may still change weights, statistics, adapters and training modes. With the tuners of this
    package, you may call `get_peft_model` before or after this function. With PEFT's own tuners, call it before,
    because layers that these tuners add later do not become lean.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> frozen = model[:3].requires_grad_(False).eval()
    >>> model = prepare_model_for_lean_training(model, inplace_norm=True, masks="bit")
    >>> print(lean_summary(model))
        1  BatchNorm2d  nothing, and works in place
        1  Conv2d       its input
        1  Conv2d       nothing of its input
        1  ReLU         its output

    Args:
        model: A model of convolutions (1d to 3d), BatchNorm and activations, such as timm's CNNs. It is changed in
            place.
        inplace_norm: Whether a BatchNorm overwrites the output of the convolution before it. The norm does this only if
            no other layer receives this output, and if the norm is frozen or the output can be recomputed (see
            `recompute`). Both layers keep their weights, so trained adapters also fit the original model. If the model
            stores the convolution's output as an attribute, the attribute becomes the normalised tensor.
        masks: The size of the masks that a ReLU or ReLU6 saves: one "byte" or one "bit" per element. Packing bits
            takes a little more time. With "off", these activations save their outputs instead of masks.
        recompute: The convolutions whose outputs are not saved, but recomputed in the backward pass. "depthwise"
            selects the depthwise convolutions. True selects all convolutions with at most 100 products per output
            element.
        split_blocks: Whether timm's inverted residual blocks run on a few samples at a time if their feature maps are
            large. Only blocks whose norms are frozen can do this. Outputs then equal those of the original blocks only
            up to rounding, because the convolutions of torch may add in another order for a smaller batch.
        checkpoint: Whether to switch on timm's gradient checkpointing, which runs the forward pass of each block again
            in the backward pass. The running statistics of BatchNorm still count each batch once.

    Returns:
        The model. `undo_lean_training` restores the original layers.

    Raises:
        ValueError: If `masks` or `recompute` is invalid, if `inplace_norm` is set and the model does not run on the
            meta device, or if `checkpoint` is set and the model does not support timm's gradient checkpointing.
    """
    if masks not in get_args(Masks):
        raise ValueError(f"masks is {masks!r}, expected one of: {', '.join(get_args(Masks))}")
    if recompute not in (False, True, "depthwise"):
        raise ValueError(f"recompute is {recompute!r}, expected one of: False, True, 'depthwise'")
    try:
        consumers = find_consumers(model)
    except Exception as error:
        if inplace_norm:
            raise ValueError(
                f"inplace_norm=True needs to see which layer receives which output, but {type(model).__name__} does "
                f"not run on the meta device ({type(error).__name__}: {error}): leave inplace_norm out"
            ) from error
        # If it is unknown which layers receive an output, activations save a mask even if the next layer saves their
        # output.
        consumers = {}
    undo_lean_training(model)
    if checkpoint:
        _switch_on_checkpointing(model)
    for module in model.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
    refs = {name: ModuleRef(model, name) for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, LeanClippedActivation):
            module.masks = masks
            module.consumers = tuple(refs[consumer] for consumer in consumers.get(name, ()) if consumer in refs)
            module.feeds_product = PRODUCT in consumers.get(name, ())
        elif isinstance(module, LeanBlock):
            module.split_blocks = split_blocks
        elif isinstance(module, LeanConvolution):
            module.recompute = recompute
    if inplace_norm:
        for conv, pair in _find_inplace_norms(model, consumers, refs):
            conv.inplace_norm = pair
    return model


def undo_lean_training(model: Model) -> Model:
    """Restore the original layers of a model in place, and return the model.

    >>> model = prepare_model_for_lean_training(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
    >>> undo_lean_training(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
      (1): ReLU()
    )
    """
    for module in model.modules():
        if vars(module).pop("is_checkpointed_by_lean", False):
            module.set_grad_checkpointing(False)  # type: ignore[operator]
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
            for name in _LEAN_ATTRIBUTES:
                vars(module).pop(name, None)
    return model


def _switch_on_checkpointing(model: nn.Module) -> None:
    """Switch on timm's gradient checkpointing, and mark the network for `undo_lean_training`.

    If checkpointing is on already, nothing changes. Raise a `ValueError` if the model does not support checkpointing.
    """
    network = next((module for module in model.modules() if hasattr(type(module), "set_grad_checkpointing")), None)
    if getattr(network, "grad_checkpointing", False):
        return
    try:
        if network is None:
            raise AssertionError("no module has the method set_grad_checkpointing")
        network.set_grad_checkpointing()  # type: ignore[operator]
    except AssertionError as error:  # timm raises it for a network without checkpointing
        raise ValueError(
            f"checkpoint=True needs a network with timm's gradient checkpointing, found {type(model).__name__} "
            f"({error}): leave checkpoint out"
        ) from error
    vars(network)["is_checkpointed_by_lean"] = True


def _find_inplace_norms(
    model: nn.Module, consumers: Mapping[str, list[str]], refs: Mapping[str, ModuleRef]
) -> Iterator[tuple[LeanConvolution, InplaceNorm]]:
    """Yield pairs (convolution, its `InplaceNorm`) for all convolutions whose output goes to one norm only.

    A norm with a second input is left out. Layers inside PEFT's wrappers (`modules_to_save`) are also left out.
    """
    num_inputs = Counter(consumer for names in consumers.values() for consumer in names)
    # In training mode and in timm's `forward_intermediates`, an output may go to other layers than in eval mode.
    other_runs = [find_consumers(model, training=True)]
    if hasattr(model, "forward_intermediates"):
        with suppress(Exception):  # a method of the same name may differ from timm's
            other_runs.append(find_consumers(model, intermediates=True))
    # PEFT's wrappers hold several copies of a layer, and the active adapter decides which copy runs.
    wrapped = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    for name, names in consumers.items():
        is_pair = len(names) == 1 == num_inputs[names[0]] and all(run.get(name, names) == names for run in other_runs)
        if not is_pair or names[0] not in refs or name.startswith(wrapped) or names[0].startswith(wrapped):
            continue
        pair = InplaceNorm(refs[name], refs[names[0]])
        conv, norm = (base_layer(model.get_submodule(path)) for path in (name, names[0]))
        if isinstance(conv, LeanConvolution) and isinstance(norm, LeanBatchNorm):
            yield conv, pair


def fusable_norms(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return pairs of a convolution and a norm that is the only layer that receives the convolution's output.

    For an adapted layer, the pair contains PEFT's layer. If the model does not run on the meta device, where the
    function finds the consumers of each output, the result is empty. `model` must not be lean, and is not lean
    afterwards.
    """
    try:
        prepare_model_for_lean_training(model, inplace_norm=True)
    except ValueError:  # the model does not run on the meta device
        return []
    pairs = [(pair.conv.module, pair.norm.module) for pair in inplace_norms(model)]
    undo_lean_training(model)
    return pairs


def lean_summary(model: nn.Module) -> str:
    """Return a table: the number of layers of each class, and what these layers save for the backward pass.

    If this package does not know what a layer saves, its row says "what torch keeps" and names the first such layer.
    The table ignores recomputation. If a BatchNorm saves its input, the layers after it save less than the table says,
    because the backward pass recomputes the listed tensors from the input of the BatchNorm.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()).requires_grad_(False)
    >>> print(lean_summary(prepare_model_for_lean_training(model)))
        1  Conv2d   nothing of its input
        1  Flatten  what torch keeps, such as 2
        1  ReLU     a byte for each element
    """
    rows: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    inplace = {base_layer(layers[1]) for pair in inplace_norms(model) if (layers := pair.layers()) is not None}
    for name, layer in _summary_layers(model):
        base = base_layer(layer)
        kind = PLAIN.get(type(base), type(base)).__name__
        row = (f"{kind} in {type(layer).__name__}" if layer is not base else kind, _kept(layer, inplace))
        rows[row] += 1
        first.setdefault(row, name)
    width = max(len(kind) for kind, _ in rows)
    return "\n".join(
        f"{count:5d}  {kind.ljust(width)}  {kept}" + (f", such as {first[kind, kept]}" if kept == _UNKNOWN else "")
        for (kind, kept), count in sorted(rows.items())
    )


_UNKNOWN = "what torch keeps"


def _summary_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of each layer. A layer is an adapted layer, a norm, or a module without children."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        base = base_layer(child)
        is_layer = child is not base or isinstance(base, BatchNorm) or not any(True for _ in base.children())
        if is_layer and not isinstance(child, nn.Identity):
            yield path, child
        # Search only the base layer: the other modules of an adapted layer belong to its adapter. The base layer may be
        # a norm of timm, which contains an activation.
        yield from _summary_layers(base, f"{path}.")


def _kept(layer: nn.Module, inplace: Collection[nn.Module]) -> str:
    """Return the text of `lean_summary` for what a layer saves. `inplace` contains the norms that work in place."""
    base = base_layer(layer)
    if isinstance(base, LeanClippedActivation):
        kept = base.kept()
        return "its output" if kept == "output" else f"a {kept} for each element"
    keeps_input = getattr(layer, "keeps_input", None)
    if keeps_input is None:
        return _UNKNOWN
    if keeps_input:
        return "its input"
    return "nothing, and works in place" if base in inplace else "nothing of its input"


PRODUCT = "*"
"""The consumer in a result of `find_consumers` if code outside of all layers multiplies an output."""
FUNCTION = ""
"""The consumer if code outside of all layers passes an output to any other function, or if the model returns it."""
# The name of the model itself in `named_modules` is also "", so `FUNCTION` refers to the whole model. The function
# `layer_keeps_input` returns True for a model with a trainable parameter. An output with the consumer `FUNCTION` then
# counts as saved.

_PRODUCTS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}


def find_consumers(model: nn.Module, *, training: bool = False, intermediates: bool = False) -> Mapping[str, list[str]]:
    """Run a copy of the model on the meta device, and return the consumers of each layer's output.

    The result maps the name of a layer to a list of its consumers. The list has an entry for each use of the output. If
    a layer receives the output, the entry is the name of this layer. Otherwise, it is `PRODUCT` or `FUNCTION`. A layer
    is either a module without children, or a norm, or an adapted layer. If a norm contains an activation, the output of
    the norm is listed under the activation. With `training`, the copy is in training mode, otherwise in eval mode. With
    `intermediates`, timm's `forward_intermediates` runs instead of `forward`.
    """
    traced = meta_copy(model).train(training)
    trace = _Trace()
    for name, module in traced.named_modules():
        if isinstance(module, BatchNorm) and module.momentum is None:
            module.momentum = 0.1  # with None, the norm would read the number of batches from a meta tensor
        # An identity gets no hooks, because its output must keep the name of the layer that computed the tensor.
        is_leaf = not any(True for _ in module.children()) and not isinstance(module, nn.Identity)
        # A base layer gets no hooks, because it counts together with its adapter as one adapted layer.
        is_inner = isinstance(traced.get_submodule(name.rpartition(".")[0]), BaseTunerLayer)
        if (is_leaf or isinstance(module, (BatchNorm, BaseTunerLayer))) and not is_inner:
            module.register_forward_pre_hook(partial(trace.enter, name), with_kwargs=True)
            module.register_forward_hook(partial(trace.leave, name), always_call=True)
    size = (getattr(traced, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        conv = next(module for module in traced.modules() if isinstance(module, ConvolutionBase))
        size = (conv.in_channels, *[224] * len(conv.kernel_size))
    images = torch.empty(2, *size, device="meta", dtype=next(traced.parameters()).dtype)
    forward = traced.forward_intermediates if intermediates else traced
    with torch.no_grad(), trace:
        trace.consume(forward(images), FUNCTION)  # type: ignore[operator]
    return trace.consumers


class _Trace(TorchFunctionMode):
    """Marks each output with the name of its layer, and records which layers and functions receive marked tensors.

    `consumers` maps the name of a layer to the names of the layers and functions that receive its output. `enter` and
    `leave` are forward hooks to register on each layer. Functions that run inside a layer are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consumers: defaultdict[str, list[str]] = defaultdict(list)
        self._running: list[str] = []

    def consume(self, values: object, consumer: str) -> None:
        """Record `consumer` for each layer whose output is in `values`.

        The attribute `_made_by` of a tensor is the name of the layer that computed this tensor.
        """
        for value in leaves(values):
            if isinstance(value, Tensor) and (producer := getattr(value, "_made_by", None)) is not None:
                self.consumers[producer].append(consumer)

    def enter(self, name: str, module: nn.Module, args: object, kwargs: object) -> None:
        self.consume((args, kwargs), name)
        self._running.append(name)

    def leave(self, name: str, module: nn.Module, args: object, output: object) -> None:
        self._running.pop()
        # If a norm contains an activation, the activation has already marked the output.
        is_norm = isinstance(base_layer(module), BatchNorm)
        is_marked = is_norm and (getattr(output, "_made_by", None) or "").startswith(f"{name}.")
        if isinstance(output, Tensor) and not is_marked:
            output._made_by = name  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in leaves(result) if isinstance(value, Tensor)]
        if tensors and not self._running:
            self.consume((args, kwargs), PRODUCT if func.__name__ in _PRODUCTS else FUNCTION)
            for tensor in tensors:
                tensor._made_by = None  # type: ignore[attr-defined]
        return result
