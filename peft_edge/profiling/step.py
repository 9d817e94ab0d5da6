"""Where a training step is: in which phase, and in which module's operators.

One training step of a model, on its own tensors or on fake ones.
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
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
PHASES = (FORWARD, BACKWARD, OPTIMIZER)


class StepLocation:
    """Knows, inside its `with` block and for each operator that a dispatch mode sees, the phase and the module.

    In the forward pass the module is the innermost one that is running. In the backward pass it is the one whose
    forward made the autograd node that is being executed: nodes are numbered as they are made, so the numbers at which
    the modules ran tell. (`torch.utils.module_tracker.ModuleTracker` goes by tensor hooks instead, and never leaves a
    module whose input needs no gradient, which frozen layers make common.)

    `parents` has the form that `FlopCounterMode` asks of its `mod_tracker`, so this can stand in that place.

    Args:
        model: Its `named_modules` are the names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._holders = {
            parameter: name for module, name in self._names.items() for parameter in module.parameters(recurse=False)
        }
        self._thread = threading.get_ident()
        self._running: list[str | None] = []
        self._numbers: list[int] = []
        self._owners: list[str | None] = []
        self._updates: list[int] = []
        self._last_phase = FORWARD
        self._hooks = ExitStack()

    def __enter__(self) -> StepLocation:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ):
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    @property
    def phase(self) -> str:
        """The phase of the operator that is being dispatched.

        What runs between the backward pass and the next forward (clipping, scaling, zeroing) counts as the optimizer's.
        """
        backward_pass = torch._C._current_graph_task_id()
        # An update may be made inside a backward pass, and a backward pass inside an update, by a closure.
        if self._updates and self._updates[-1] == backward_pass and not self._running:
            self._last_phase = OPTIMIZER
        elif backward_pass != -1:
            self._last_phase = BACKWARD
        elif self._running:
            self._last_phase = FORWARD
        elif self._last_phase == BACKWARD:
            self._last_phase = OPTIMIZER
        return self._last_phase

    def locate(self) -> tuple[str, str | None]:
        """Returns the phase and the module of the operator that is being dispatched; None outside the model."""
        phase = self.phase
        if self._running:
            # In the backward pass too, where checkpointing runs modules again and makes new nodes.
            self._remember(self._running[-1])
            return phase, self._running[-1]
        if phase == FORWARD:
            self._remember(None)
        elif phase == BACKWARD and (node := torch._C._current_autograd_node()) is not None:
            return phase, self._owner(node)
        return phase, None

    @property
    def parents(self) -> set[tuple[str, str | None]]:
        """The place of the operator, under which `FlopCounterMode` enters it."""
        return {self.locate()}

    def _owner(self, node: Any) -> str | None:
        if isinstance(parameter := getattr(node, "variable", None), Tensor):
            # The node that adds to a parameter's gradient has no number.
            return self._holders.get(parameter)
        position = bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._owners[position] if position >= 0 else None

    def _remember(self, module: str | None) -> None:
        # Every thread has numbers of its own, and on CUDA the backward pass, with what it computes again, has a thread.
        if threading.get_ident() != self._thread:
            return
        # Autograd makes an operator's node before it dispatches it; an operator without one finds an older number.
        number = torch.autograd._get_sequence_nr() - 1
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._owners.append(module)

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        outer = self._running[-1] if self._running else None
        self._running.append(self._names.get(module, outer))

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # A module that was entered before the block began was not noted.
        if self._running:
            self._running.pop()

    def _enter_optimizer(self, *arguments: Any) -> None:
        self._updates.append(torch._C._current_graph_task_id())

    def _leave_optimizer(self, *arguments: Any) -> None:
        self._updates.pop()


def ancestors(module: str | None) -> Iterator[str]:
    """Yields the names of a module and of all that contain it, up to the model, which is `""`; nothing for None."""
    while module is not None:
        yield module
        module = module.rpartition(".")[0] if module else None


Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
LossFn = Callable[[Any], Tensor]


def take_step(model: nn.Module, inputs: Inputs, optimizer: Optimizer | None, loss_fn: LossFn | None) -> None:
    """Takes one step: gradients dropped, forward, backward where something is trained, and the optimizer.

    Args:
        model: In the mode (train or eval) that it shall run in.
        inputs: A tensor or a tuple for positional arguments, a mapping for keyword arguments.
        optimizer: None to stop after the backward pass.
        loss_fn: From the model's output to a scalar. By default `output.loss` where it is set, and otherwise the mean
            of the output (of `output.logits`), whose gradient costs the model what any loss's does.

    Raises:
        ValueError: The loss is no scalar, or the output holds nothing that a loss could be made of.
    """
    model.zero_grad()
    loss = (loss_fn or _default_loss)(_call(model, inputs))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor of one element, found {found}: pass loss_fn")
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _default_loss(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss
    return logits_of(output, advice="pass loss_fn").float().mean()


def logits_of(output: Any, *, advice: str) -> Tensor:
    """Returns the model's output, or the logits in it.

    Raises:
        ValueError: It is neither; the message ends with the advice.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns {type(output).__name__}, expected a tensor or logits: {advice}")
    return logits


class _FakeMode(FakeTensorMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.rand.default and list(args[0]) == [1]:
            # Methods of PEFT draw one number and look at it, to drop a module now and then: here none is dropped.
            with self:
                return torch.tensor([1.0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, DataDependentOutputException):
            raise ValueError(
                f"the step reads the value of a tensor ({error.func}), as some optimizers do, and an analysis has only "
                "shapes: choose others, or measure a real step by FlopCounter and MemoryTracker"
            ) from error


def fake_copy(
    model: nn.Module, optimizer: Optimizer | None, inputs: Inputs
) -> tuple[FakeTensorMode, nn.Module, Optimizer | None, Inputs]:
    """Copies model, optimizer and inputs, with fake tensors, which have a shape but no memory, in the place of theirs.

    Tied parameters stay tied and views stay views of one storage. Tensors on the meta device become fake CPU tensors,
    so that they run through the operators of a real model.

    Returns:
        The mode to run the copies in, and the copies. The originals are left as they are.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    state = [] if optimizer is None else tree_leaves(list(optimizer.state.values()))
    # What deepcopy finds in its memo it does not copy.
    memo: dict[int, Any] = {id(leaf): _fake_state(leaf, mode) for leaf in state if isinstance(leaf, Tensor)}
    memo |= {id(tensor): _fake(tensor, mode) for tensor in [*model.parameters(), *model.buffers()]}
    model_copy, optimizer_copy = copy_together(model, optimizer, memo)
    # A tokenizer's mapping is no dict, and torch would not look inside.
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return mode, model_copy, optimizer_copy, tree_map_only(Tensor, lambda tensor: _fake(tensor, mode), inputs)


def copy_together(
    model: nn.Module, optimizer: Optimizer | None, memo: dict[int, Any]
) -> tuple[nn.Module, Optimizer | None]:
    """Copies a model and the optimizer of its parameters.

    Args:
        model: To be copied.
        optimizer: To be copied, with those of its attributes that torch's optimizers do not have.
        memo: As `copy.deepcopy` takes it: what is not to be copied, by identity.

    Raises:
        ValueError: The optimizer trains parameters that are not the model's, or one of the two cannot be copied.
    """
    parameters = set(model.parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    if any(parameter not in parameters for group in groups for parameter in group["params"]):
        raise ValueError(
            "the optimizer trains parameters that are not the model's: if they are those of the loss, make the loss a "
            "part of the model"
        )
    try:
        model_copy, optimizer_copy = copy.deepcopy((model, optimizer), memo)
        if optimizer_copy is not None:
            # torch pickles its own attributes only. A schedule sets one, `step`, that would step the original.
            missing = vars(optimizer).keys() - vars(optimizer_copy).keys() - {"step"}
            vars(optimizer_copy).update(copy.deepcopy({name: vars(optimizer)[name] for name in missing}, memo))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} and {type(optimizer).__name__} cannot be copied ({error}): measure a real step of "
            "them, inside of FlopCounter and MemoryTracker"
        ) from error
    return model_copy, optimizer_copy


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the meta device, which takes no memory; tied parameters stay tied."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _fake_state(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if tensor.dim() or not tensor.is_cpu:
        return _fake(tensor, mode)
    # Optimizers read their number of steps: made of a number, a fake tensor keeps its value.
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake
