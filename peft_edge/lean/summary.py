"""What each layer of a model keeps for the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_edge.lean.folding import base_layer, folded_norms
from peft_edge.lean.layers import PLAIN, LeanClippedActivation


def lean_summary(model: nn.Module) -> str:
    """A table of the layers of a model by kind, with what they keep for the backward pass as things stand.

    Layers that `prepare_model_for_lean_training` does not know have "what torch keeps", with the name of the first one.

    Args:
        model: with adapters or without, lean or plain.
    """
    rows: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    folded = {base_layer(layers[1]) for pair in folded_norms(model) if (layers := pair.layers()) is not None}
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
