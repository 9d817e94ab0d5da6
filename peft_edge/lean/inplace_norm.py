"""Let a BatchNorm overwrite the output of the convolution before it.

1. `prepare_model_for_lean_training(model, inplace_norm=True)` finds each convolution whose output goes to one norm
   only. It stores references to both layers on the convolution, as an `InplaceNorm`.
2. In a forward pass the convolution marks its output as overwritable by this norm (`mark_overwritable`), unless a hook,
   a compiler or a function transform may read the output.
3. The norm overwrites an input with this mark (`is_overwritable`), unless the norm must save the input. In all other
   cases, the norm allocates a new tensor.

Both layers keep their parameters. The mark is set in each forward pass, so adapters, training modes and statistics may
change at any time. Folding the norm into the kernel would save a little more time, but rounding would differ. Some
elements would then cross the kink of an activation, and gradients would differ by some percent.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_edge._compat import has_hooks, is_transformed, is_view, saved_tensors_hook, version_of


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the base layer if `layer` is a PEFT adapter, otherwise `layer` itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


class ModuleRef:
    """A reference by name to the module `path` of the model `root`.

    If PEFT replaces the module, the reference leads to the new module. In a `copy.deepcopy` of the model, the reference
    points into the copy. If only a layer that stores the reference is copied, or if the reference is pickled, the new
    reference is empty, so its `module` is None.
    """

    def __init__(self, root: nn.Module | None, path: str) -> None:
        self._root, self._path = root, path

    @property
    def module(self) -> Any:
        """The module to which this reference leads. None if the reference is empty or the module does not exist."""
        return self._get(self._path)

    def path_below(self, other: ModuleRef) -> list[nn.Module | None]:
        """Return the module and its parents, outermost first, but without the parents that contain `other.module`.

        An entry is None if the model has no module at this position.
        """
        paths = itertools.accumulate(self._path.split("."), "{}.{}".format)
        return [self._get(path) for path in paths if not f"{other._path}.".startswith(f"{path}.")]

    def _get(self, path: str) -> nn.Module | None:
        try:
            return None if self._root is None else self._root.get_submodule(path)
        except AttributeError:  # PEFT or the user has removed the module
            return None

    def __deepcopy__(self, memo: dict[int, nn.Module]) -> ModuleRef:
        return ModuleRef(memo.get(id(self._root)), self._path)

    def __reduce__(self) -> tuple[type[ModuleRef], tuple[None, str]]:
        return ModuleRef, (None, self._path)


class InplaceNorm(NamedTuple):
    """References to a convolution and to the norm that may overwrite its output. Only this norm receives the output."""

    conv: ModuleRef
    norm: ModuleRef

    def layers(self) -> tuple[nn.Module, nn.Module] | None:
        """Return the convolution and the norm. If PEFT adapts one of them, return its adapter layer instead.

        Return None if a layer is missing, or if other code may read the tensor that the convolution passes to the norm.
        """
        convs, norms = self.conv.path_below(self.norm), self.norm.path_below(self.conv)
        found = [module for module in (*convs, *norms) if module is not None]
        if len(found) < len(convs) + len(norms) or any(
            exposes_tensors(m) or exposes_tensors(base_layer(m)) for m in found
        ):
            return None
        return found[len(convs) - 1], found[-1]


def inplace_norms(model: nn.Module) -> list[InplaceNorm]:
    """Return all pairs of a convolution and a norm that `prepare_model_for_lean_training` stored in a model."""
    return [pair for module in model.modules() if (pair := getattr(module, "inplace_norm", None)) is not None]


def mark_overwritable(y: Tensor, layer: nn.Module) -> Tensor:
    """Return the output y of a convolution, marked as overwritable if the convolution has an `inplace_norm`.

    `layer` is the convolution or its adapter. y must be a new tensor that `layer` does not save. y gets no mark if a
    hook, a compiler or a function transform may read y, or if y has only one pixel.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or y.is_inference() or is_view(y) or is_transformed(y):
        return y
    pair = getattr(base_layer(layer), "inplace_norm", None)
    # A map of one pixel is both contiguous and channels-last. For such a map, an in-place norm and an ordinary norm may
    # choose different formats, and then round differently.
    if pair is None or y.shape[2:].numel() == 1:
        return y
    layers = pair.layers()
    if layers is not None and layer in (layers[0], base_layer(layers[0])):
        y._overwritable_by = _mark(y, layers[1])  # type: ignore[attr-defined]
    return y


def is_overwritable(x: Tensor, norm: nn.Module) -> bool:
    """Return whether `norm` may overwrite x, and remove the mark that `mark_overwritable` set on x.

    `norm` is a normalisation layer or its adapter.
    """
    if torch.compiler.is_compiling():
        return False
    mark = vars(x).pop("_overwritable_by", None)
    return mark is not None and not x.retains_grad and mark == _mark(x, norm)


def _mark(y: Tensor, norm: nn.Module) -> tuple[int, int, bool, object]:
    """Return the mark that allows `norm` to overwrite y: id of `norm`, version of y, grad mode, saved-tensor hooks."""
    # Gradient checkpointing that starts between the convolution and the norm saves y, so the norm must not overwrite y.
    # Checkpointing changes the hooks or the grad mode, which makes the mark invalid. The mark is an attribute of y and
    # is pickled with y. It therefore contains the id of the norm instead of the norm.
    return id(norm), version_of(y), torch.is_grad_enabled(), saved_tensors_hook()


def exposes_tensors(layer: nn.Module) -> bool:
    """Return whether other code, such as a hook, may read the input or output of a layer."""
    # PEFT's `AuxiliaryTrainingWrapper` holds several copies of a layer. Its attributes are those of one copy, but
    # another copy may run. Therefore, treat the wrapper like a layer with hooks.
    return has_hooks(layer) or "forward" in vars(layer) or isinstance(layer, AuxiliaryTrainingWrapper)
