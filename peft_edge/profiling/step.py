"""Take one training step, on real or on fake tensors, and find the phase and the module of each operator.

`take_step` runs a step. `fake_copy` copies a model with fake tensors, so that a step needs shapes but no values.
`StepLocation` returns the phase (`forward`, `backward` or `optimizer`) and the module of the current operator.
`count_flops` and `track_memory` use all three.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_edge import _compat

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
PHASES = (FORWARD, BACKWARD, OPTIMIZER)

Inputs = Tensor | tuple[object, ...] | Mapping[str, object]
LossFn = Callable[[Any], Tensor]


def take_step(model: nn.Module, inputs: Inputs, optimizer: Optimizer | None, loss_fn: LossFn | None) -> None:
    """Take one step: clear the gradients, then run the forward pass, the backward pass and the update.

    There is no backward pass if the loss requires no gradient, and no update if `optimizer` is None. If `loss_fn` is
    None, the loss is `output.loss`. If `output.loss` is missing or None, the loss is the mean of `output.logits`. If
    `output.logits` is missing too, the loss is the mean of `output`.

    Raises:
        ValueError: If the loss is not a scalar, or the default loss finds no tensor in the output.
    """
    model.zero_grad()
    # Do not assign the output to a variable, so that its memory is freed when the loss no longer needs it.
    loss = (loss_fn or _default_loss)(_call(model, inputs))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor of one element, found {found}: pass loss_fn")
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()


def _call(model: nn.Module, inputs: Inputs) -> object:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _default_loss(output: object) -> Tensor:
    loss = getattr(output, "loss", None)
    return logits_of(output, advice="pass loss_fn").float().mean() if loss is None else loss


def logits_of(output: object, *, advice: str) -> Tensor:
    """Return `output.logits` if `output` has this attribute. Otherwise, return `output`.

    Raises:
        ValueError: If the result is not a tensor. The message ends with `advice`.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns {type(output).__name__}, expected a tensor or logits: {advice}")
    return logits


class StepLocation:
    """Find the phase and the module of each operator that a dispatch mode sees inside a `with` block.

    In the forward pass, the module is the innermost running module. In the backward pass, the module is the one whose
    forward pass created the current autograd node. Autograd numbers the nodes in the order of creation. This class
    records which module was running when each number was assigned, and looks up the module by the number of the node.

    torch's own `torch.utils.module_tracker.ModuleTracker` cannot be used, because it detects the end of a module's
    backward pass by the gradient of the module's input. If all layers before a trainable layer are frozen, the input of
    the trainable layer requires no gradient, and the tracker would never leave this layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._holders = {
            parameter: name for module, name in self._names.items() for parameter in module.parameters(recurse=False)
        }
        self._thread = threading.get_ident()
        self._running: list[str | None] = []
        # Module `_owners[i]` created the autograd nodes with the numbers from `_numbers[i]` to `_numbers[i + 1] - 1`.
        self._numbers: list[int] = []
        self._owners: list[str | None] = []
        # For each running `optimizer.step()`: the id of the backward pass in which the update began, or -1 if it began
        # outside a backward pass.
        self._updates: list[int] = []
        self._last_phase = FORWARD
        self._hooks = ExitStack()

    def __enter__(self) -> StepLocation:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(lambda *_: self._updates.append(_compat.backward_pass_id())),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def locate(self) -> tuple[str, str | None]:
        """Return the phase and the module name of the current operator. The name is None outside the model."""
        phase = self._phase()
        if self._running:
            # With gradient checkpointing, modules also run in the backward pass, and create autograd nodes there.
            self._note_owner(self._running[-1])
            return phase, self._running[-1]
        if phase == FORWARD:
            self._note_owner(None)
        elif phase == BACKWARD and (node := _compat.current_node()) is not None:
            return phase, self._owner(node)
        return phase, None

    @property
    def parents(self) -> set[tuple[str, str | None]]:
        """A set whose only element is the result of `locate`.

        `FlopCounterMode` adds the FLOPs of an operator to each element of `mod_tracker.parents`.
        """
        return {self.locate()}

    def _phase(self) -> str:
        backward_pass = _compat.backward_pass_id()
        # An update may run inside a backward pass (layer-wise updates), and a backward pass inside an update (closure).
        if self._updates and self._updates[-1] == backward_pass and not self._running:
            self._last_phase = OPTIMIZER
        elif backward_pass != -1:
            self._last_phase = BACKWARD
        elif self._running:
            self._last_phase = FORWARD
        elif self._last_phase == BACKWARD:
            # Operators outside the model after the backward pass belong to the update. They clip, scale or zero
            # gradients.
            self._last_phase = OPTIMIZER
        return self._last_phase

    def _owner(self, node: Node) -> str | None:
        if isinstance(parameter := getattr(node, "variable", None), Tensor):
            # The node that accumulates a parameter's gradient has no number, but refers to the parameter.
            return self._holders.get(parameter)
        position = bisect_right(self._numbers, _compat.node_number(node)) - 1
        return self._owners[position] if position >= 0 else None

    def _note_owner(self, module: str | None) -> None:
        # On CUDA, the backward pass, including recomputed forward passes, runs in another thread. Each thread numbers
        # its own autograd nodes, so the numbers of different threads cannot be compared.
        if threading.get_ident() != self._thread:
            return
        # Autograd creates the node of an operator before the dispatch mode sees the operator. If the operator needs no
        # node, the number of the last node is unchanged.
        number = _compat.last_node_number()
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._owners.append(module)

    def _enter_module(self, module: nn.Module, inputs: object) -> None:
        outer = self._running[-1] if self._running else None
        self._running.append(self._names.get(module, outer))

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        # The list is empty if the module's forward pass began before the `with` block.
        if self._running:
            self._running.pop()

    def _leave_optimizer(self, *arguments: object) -> None:
        self._updates.pop()


def ancestors(module: str | None) -> Iterator[str]:
    """Yield the name `module`, and then the names of all modules that contain this module, up to `""`, the model.

    Yield nothing if `module` is None.
    """
    while module is not None:
        yield module
        module = module.rpartition(".")[0] if module else None


def fake_copy(
    model: nn.Module, optimizer: Optimizer | None, inputs: Inputs
) -> tuple[_compat.FakeMode, nn.Module, Optimizer | None, Inputs]:
    """Copy the model, the optimizer and the inputs with fake tensors, which have a shape but no memory.

    Tied parameters stay tied. Tensors that share a storage still share it in the copies, except tensors on the meta
    device. These become fake CPU tensors, so that the step runs the same operators as a real step on a CPU.

    Returns:
        The context manager in which the copies must run, and the copies of the model, the optimizer and the inputs.

    Raises:
        ValueError: See `copy_together`.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    state = [] if optimizer is None else _compat.leaves(list(optimizer.state.values()))
    # deepcopy treats tensors in the memo as already copied.
    memo: dict[int, object] = {id(leaf): _fake_state(leaf, mode) for leaf in state if isinstance(leaf, Tensor)}
    memo |= {id(tensor): _fake(tensor, mode) for tensor in [*model.parameters(), *model.buffers()]}
    model_copy, optimizer_copy = copy_together(model, optimizer, memo)
    # A tokenizer returns a mapping that is not a dict. `map_only` would treat such a mapping as a single leaf.
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return mode, model_copy, optimizer_copy, _compat.map_only(Tensor, lambda tensor: _fake(tensor, mode), inputs)


def copy_together(
    model: nn.Module, optimizer: Optimizer | None, memo: dict[int, object]
) -> tuple[nn.Module, Optimizer | None]:
    """Copy a model and its optimizer, so that the new optimizer updates the new model.

    `memo` is the second argument of `copy.deepcopy`.

    Raises:
        ValueError: If the optimizer updates parameters outside the model, or if the model or the optimizer cannot be
            copied.
    """
    parameters = set(model.parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    if any(parameter not in parameters for group in groups for parameter in group["params"]):
        raise ValueError(
            "the optimizer updates parameters that are not the model's: if they belong to the loss, make the loss a "
            "part of the model"
        )
    try:
        model_copy, optimizer_copy = copy.deepcopy((model, optimizer), memo)
        if optimizer_copy is not None:
            # deepcopy of an optimizer drops attributes that subclasses add, so copy them here. Skip `step`, which a
            # learning-rate scheduler replaces by a function that always calls the step of the original optimizer.
            missing = vars(optimizer).keys() - vars(optimizer_copy).keys() - {"step"}
            vars(optimizer_copy).update(copy.deepcopy({name: vars(optimizer)[name] for name in missing}, memo))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} and {type(optimizer).__name__} cannot be copied ({error}): measure a real step "
            "with FlopCounter and MemoryTracker"
        ) from error
    return model_copy, optimizer_copy


class _FakeMode(_compat.FakeMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        if func is torch.ops.aten.rand.default and list(args[0]) == [1]:
            # PEFT's LoHa and LoKr drop a module if a random number is below `module_dropout`. A fake random number has
            # no value to compare, so return 1.0, which drops no module.
            with self:
                return torch.tensor([1.0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, _compat.FakeValueError):
            raise ValueError(
                f"the step reads the value of a tensor ({error.func}), as some optimizers do, but an analysis has only "
                "shapes: choose another optimizer or model, or measure a real step with FlopCounter and MemoryTracker"
            ) from error


def _fake_state(tensor: Tensor, mode: _compat.FakeMode) -> Tensor:
    if tensor.dim() or not tensor.is_cpu:
        return _fake(tensor, mode)
    # Optimizers read the value of their step counter. A fake tensor has a value only if it was created from a number.
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)


def _fake(tensor: Tensor, mode: _compat.FakeMode) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
