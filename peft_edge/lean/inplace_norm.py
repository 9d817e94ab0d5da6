"""A convolution and the frozen batch normalisation behind it as one layer: the norm works on the output in place.

Neither layer changes: the convolution lets the norm have its output, and the norm writes over what it was given so.
Whatever happens to either (another adapter, training, statistics estimated anew) shows in the next forward pass, and
what does not go from one to the other is left as it is. A kernel that is scaled by the norm saves a little more time,
but it rounds differently, which carries elements over the kinks of the activations: gradients differ by some percent.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def base_layer(layer: Any) -> Any:
    """The layer that PEFT has adapted, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


class ModuleRef:
    """A place in a model, whose module changes when it is adapted.

    It goes along with a copy of the model. A copy of a part, or a pickled one, has nothing in its places.

    Args:
        root: the model.
        path: the place's name in it.
    """

    def __init__(self, root: nn.Module | None, path: str) -> None:
        self._root, self._path = root, path

    @property
    def module(self) -> Any:
        """The module that stands there now, or None."""
        return self._module(self._path)

    def modules_apart_from(self, other: ModuleRef) -> list[Any]:
        """The modules around the place that are not around another one, and last the one that stands there now."""
        paths = itertools.accumulate(self._path.split("."), "{}.{}".format)
        return [self._module(path) for path in paths if not f"{other._path}.".startswith(f"{path}.")]

    def _module(self, path: str) -> Any:
        try:
            return None if self._root is None else self._root.get_submodule(path)
        except AttributeError:
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRef:
        return ModuleRef(memo.get(id(self._root)), self._path)

    def __reduce__(self) -> Any:
        return ModuleRef, (None, self._path)


class InplaceNorm(NamedTuple):
    """A convolution and the norm that takes its output, and nothing else does."""

    conv: ModuleRef
    norm: ModuleRef

    def layers(self) -> tuple[Any, Any] | None:
        """The two that stand there now; None while one is gone, or hooks look at what goes from one to the other."""
        before, behind = self.conv.modules_apart_from(self.norm), self.norm.modules_apart_from(self.conv)
        for module in (*before, *behind):
            if module is None or _is_observed(module) or _is_observed(base_layer(module)):
                return None
        return before[-1], behind[-1]


def inplace_norms(model: nn.Module) -> list[InplaceNorm]:
    """What is folded in a model."""
    return [pair for module in model.modules() if (pair := getattr(module, "inplace_pair", None)) is not None]


def mark_overwritable(y: Tensor, layer: nn.Module) -> Tensor:
    """Lets the norm behind a convolution write over its output, which is returned.

    Not while hooks look at what is between the two, and not in compiled or traced models, or under `torch.func`.

    Args:
        y: the output, a tensor that the layer has made and does not keep.
        layer: the convolution, or the adapted one around it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or y.is_inference():
        return y
    if y._is_view() or torch._C._functorch.is_functorch_wrapped_tensor(y):
        return y
    pair = getattr(base_layer(layer), "inplace_pair", None)
    # A map of one pixel is of several memory formats at once, and not of the same ones in place, which orders sums.
    if pair is None or y.shape[2:].numel() == 1:
        return y
    layers = pair.layers()
    if layers is not None and layer in (layers[0], base_layer(layers[0])):
        y._overwritable_by = _mark(y, layers[1])  # type: ignore[attr-defined]
    return y


def is_overwritable(x: Tensor, norm: nn.Module) -> bool:
    """Whether a norm may write over its input; asked once.

    Args:
        x: the input.
        norm: the layer in the norm's place.
    """
    mark = vars(x).pop("_overwritable_by", None)
    return mark is not None and mark == _mark(x, norm)


def _mark(y: Tensor, norm: nn.Module) -> tuple[Any, ...]:
    # A checkpoint that begins between the two keeps what goes from one to the other. It shows in the surroundings.
    surroundings = torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)
    # Not the norm itself, which would be saved with the tensor.
    return id(norm), y._version, *surroundings


def _is_observed(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # What a wrapper answers is what the layer inside answers, which may not be the one that runs.
    return any(hooks) or "forward" in vars(layer) or isinstance(layer, AuxiliaryTrainingWrapper)
