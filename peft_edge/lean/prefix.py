"""A model cut in two: a frozen prefix, whose outputs never change, and the tail that trains on them.

Backpropagation stops at the first layer that trains anything. Where the layers before it are frozen too, what they make
of a training image is the same in every epoch: latent replay (Pellegrini et al., arXiv 1912.01100, section III).
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class _Reached(Exception):
    """Stops a forward pass where the tail begins."""


@dataclass
class _Call:
    """A module that a forward pass went through, and the modules that ran inside of it, in their order."""

    module: nn.Module
    calls: list[_Call] = field(default_factory=list)


class Prefix:
    """The layers of a model before the first one that trains anything.

    Attributes:
        tail: The model without its prefix: it takes what `features` returns, and gives what the model gives. Its
            modules are those of the model, under the same names, so training it trains the model.
        start: The name of the module at which the tail starts.

    Args:
        model: Any model that takes one tensor; its prefix is a chain of modules, as in timm's CNNs.
        images: A batch to check the cut with, (B, 3, H, W) with B > 1, on the model's device.

    Raises:
        ValueError: Nothing trains, nothing comes before what trains, the outputs of the prefix change while training,
            or they are not all that the tail needs.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        training = model.training
        model.eval()
        try:
            self.start, modules, self.tail = _cut(model, images)
            self._start, self._model = model.get_submodule(self.start), model
            self._modules = {name: module for name, module in model.named_modules() if module in modules}
            self._check_constant(images)
        finally:
            model.train(training)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns the prefix's outputs in eval mode, (B, *shape), for images of shape (B, 3, H, W)."""
        training = self._model.training
        try:
            device = next(self._model.parameters()).device
            return _input_of(self._start, self._model.eval(), images.to(device))
        finally:
            self._model.train(training)

    @property
    def fingerprint(self) -> str:
        """Changes with the layers of the prefix, their weights and their statistics, and with the place of the cut."""
        digest = hashlib.sha256(self.start.encode())
        for name, module in self._modules.items():
            digest.update(f"{name} {module}\n".encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _check_constant(self, images: Tensor) -> None:
        """Checks that the prefix does in training what it does in evaluation, without a trace on the model."""
        model = copy.deepcopy(self._model)
        start, before = model.get_submodule(self.start), dict(self._model.named_buffers())
        with torch.no_grad(), torch.random.fork_rng():
            expected = _input_of(start, model, images)
            found = _input_of(start, model.train(), images)
        moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        if moved:
            raise ValueError(
                f"nothing can be replayed: {moved[0]} moves with every batch, and stands before the first trained "
                f"layer, {self.start}: choose norm=restat or norm=frozen"
            )
        if not torch.equal(found, expected):
            raise ValueError(
                f"nothing can be replayed: the layers before the first trained one, {self.start}, give something else "
                "in training than in evaluation: leave dropout and drop path out of them"
            )


def _cut(model: nn.Module, images: Tensor) -> tuple[str, set[nn.Module], nn.Module]:
    """Finds the last place in front of what trains where one tensor holds all that the rest needs.

    Returns:
        The name of the module in front of which that is, the modules before, and the tail.
    """
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        expected, call = _trace(model, images)
    skipped: set[nn.Module] = set()
    cuts: list[tuple[nn.Module, set[nn.Module]]] = []
    while (position := next((i for i, c in enumerate(call.calls) if _trains(c.module)), None)) is not None:
        before = {earlier.module for earlier in call.calls[:position]}
        call = call.calls[position]
        if before - skipped:
            skipped = skipped | before
            cuts.append((call.module, skipped))
    if not _trains(model):
        raise ValueError("nothing can be replayed: nothing in the model is trained by gradients")
    if not _has_weights(skipped):
        first = names[call.module] or type(model).__name__
        raise ValueError(
            f"nothing can be replayed: {first} trains, and no layer comes before it. Train later layers only, for "
            "example with target_modules=last-stage"
        )
    for start, before in reversed(cuts):
        tail = _without(model, before)
        try:
            with torch.no_grad():
                is_same = torch.equal(tail(_input_of(start, model, images)), expected)
        except (RuntimeError, AttributeError, LookupError, TypeError, ValueError):
            # A cut through a block, whose shortcut needs the block's input, may not even run.
            continue
        if is_same and _has_weights(before):
            return names[start], before, tail
    raise ValueError(
        f"nothing can be replayed: {names[call.module]} trains, and what comes before it is no chain of modules, so "
        "that no single tensor holds all that the rest of the model needs. Train without replay"
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_weights(modules: set[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.parameters())


def _trace(model: nn.Module, images: Tensor) -> tuple[Tensor, _Call]:
    """Returns the model's output, and what ran inside of what."""
    running = [_Call(model)]

    def enter(module: nn.Module, inputs: Any) -> None:
        call = running[0] if module is model else _Call(module)
        if module is not model:
            running[-1].calls.append(call)
        running.append(call)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        return model(images), running[0]
    finally:
        for hook in hooks:
            hook.remove()


def _input_of(start: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """Runs the model up to the module `start`, and returns that module's input."""
    found: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Reached

    hook = start.register_forward_pre_hook(stop, prepend=True)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0].clone(memory_format=torch.preserve_format)


def _without(module: nn.Module, skipped: set[nn.Module]) -> nn.Module:
    """Returns the module with identities in the place of those that are skipped; what holds none of them is shared."""
    if module in skipped:
        return nn.Identity()
    children = {name: child if child is None else _without(child, skipped) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view
