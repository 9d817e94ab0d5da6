"""Where a training step is: in which phase, and in which module's operators."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
