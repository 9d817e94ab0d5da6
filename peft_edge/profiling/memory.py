"""Memory of training steps: what is alive at the peak and at the end of the forward pass, of which kind and whose."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_edge.profiling.location import BACKWARD, FORWARD, StepLocation, ancestors
from peft_edge.profiling.process_memory import ProcessPeak
from peft_edge.profiling.step import Inputs, LossFn, copy_together, fake_copy, take_step
from peft_edge.profiling.storages import (
    BUFFERS,
    GRADIENTS,
    KINDS,
    OPTIMIZER_STATE,
    PARAMETERS,
    StorageLog,
    innermost_around,
)

KindBytes = dict[str, int]


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of tensors, each storage counted once, by kind.

    - `parameters`, `buffers`: the model's, frozen ones too.
    - `gradients`: what became a parameter's `grad`.
    - `activations`: what the forward pass was given or made and is there at its end, for the backward pass; where none
      follows, at the end of the block.
    - `temporaries`: the rest: what the forward pass dropped again, gradients of activations, what checkpointing
      computes again, what the optimizer uses besides its state.
    - `optimizer`: its state.

    These are the bytes asked for. What an operator takes and frees inside itself, and what an allocator rounds up or
    keeps, is in the process's figures only.
    """

    peak_bytes: int
    """The most that was alive at one time."""
    peak: KindBytes
    """What that was, by kind."""
    peak_phase: str
    """The phase in which it was reached: `forward`, `backward` or `optimizer`."""
    forward_end_bytes: int
    """What was alive when the forward pass ended; of several, the one with the most."""
    forward_end: KindBytes
    """What that was, by kind."""
    start_bytes: int
    """What was alive at the start: model, gradients, optimizer state and inputs."""
    peak_by_module: dict[str, KindBytes] = field(repr=False)
    """For each module, `""` being the model, its part of the peak, with its submodules'.

    Parameters, their gradients and optimizer state belong to the module that holds the parameter, or to the innermost
    one around all that do, and the rest to the module whose operators made it. What no module made (inputs, the loss,
    the optimizer's temporaries) is in the totals only.
    """
    forward_end_by_module: dict[str, KindBytes] = field(repr=False)
    """Likewise at the end of the forward pass."""
    cuda_peak_bytes: int | None = None
    """The most that the CUDA allocator had given out; None without CUDA, and from a tracker alone, as the next two."""
    peak_rss_bytes: int | None = None
    """The most physical memory that the process had; None where nothing real was run."""
    rss_growth_bytes: int | None = None
    """Its part above what the process had before the step; None where the system does not tell."""


class MemoryTracker(TorchDispatchMode):
    """Tracks the memory of what runs inside its `with` block: one training step, or several.

    The model may have frozen, tied or viewed parameters, and its tensors may be fake ones. Tensors on devices that its
    parameters are not on are left out.

    `torch.distributed._tools.mem_tracker.MemTracker` does the like for one step of a model that is trained as a whole;
    it hooks the gradient of every parameter, which torch refuses for frozen ones.

    Args:
        model: Its parameters and buffers, and any gradients that they have, are alive from the start.
        optimizer: Of which the state is to be told from the optimizer's temporaries.
        inputs: What the model will be called with. Tensors that nobody tells of are counted from their first use.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, inputs: Inputs | None = None) -> None:
        super().__init__()
        self._modules = dict(model.named_modules())
        self._optimizer = optimizer
        self._inputs = inputs
        self._owners: dict[Tensor, str | None] = {}
        self._location = StepLocation(model)
        self._log = StorageLog({parameter.device for parameter in model.parameters()})
        self._start = 0
        self._forward_ends: list[int] = []
        self._entered = ExitStack()

    def __enter__(self) -> MemoryTracker:
        self._claim_state()
        self._log.see(tree_leaves(self._inputs))
        self._inputs = None
        self._start = len(self._log)
        for parameter in self._owners:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._claim_gradient)
                self._entered.callback(handle.remove)
        self._entered.enter_context(self._location)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._entered.close()
        self._claim_state()
        if not self._forward_ends:
            self._end_forward()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and logs the storages that it was given and has made."""
        log = self._log
        phase, module = self._location.locate()
        if phase == BACKWARD and log.phase == FORWARD:
            self._end_forward()
        # An input that nobody told of is its first user's no more than anybody else's.
        log.phase, log.module = phase, None
        log.see(args)
        result = func(*args, **(kwargs or {}))
        log.module = module
        log.see(result)
        return result

    def result(self) -> MemoryProfile:
        """Returns the figures, when the block has ended."""
        totals = self._log.totals()
        peak_at = max(range(len(totals)), key=totals.__getitem__)
        forward_end_at = max(self._forward_ends, key=totals.__getitem__)
        peak, peak_by_module = self._alive(peak_at)
        forward_end, forward_end_by_module = self._alive(forward_end_at)
        return MemoryProfile(
            peak_bytes=totals[peak_at],
            peak=peak,
            peak_phase=self._log.phase_of(peak_at),
            forward_end_bytes=totals[forward_end_at],
            forward_end=forward_end,
            start_bytes=totals[self._start],
            peak_by_module=peak_by_module,
            forward_end_by_module=forward_end_by_module,
        )

    def _alive(self, events: int) -> tuple[KindBytes, dict[str, KindBytes]]:
        total = dict.fromkeys(KINDS, 0)
        by_module = {name: dict.fromkeys(KINDS, 0) for name in self._modules}
        for (module, kind), size in self._log.alive(events).items():
            total[kind] += size
            for name in ancestors(module):
                by_module[name][kind] += size
        return total, by_module

    def _end_forward(self) -> None:
        self._forward_ends.append(len(self._log))
        self._log.end_forward()

    def _claim_state(self) -> None:
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners[parameter] = innermost_around(name, self._owners.get(parameter, name))
            for buffer in module.buffers(recurse=False):
                self._log.claim(buffer, BUFFERS, name)
        for parameter, owner in self._owners.items():
            self._log.claim(parameter, PARAMETERS, owner)
            self._claim_gradient(parameter)
        if self._optimizer is not None:
            for parameter, state in self._optimizer.state.items():
                for leaf in tree_leaves(state):
                    if isinstance(leaf, Tensor):
                        self._log.claim(leaf, OPTIMIZER_STATE, self._owners.get(parameter))

    def _claim_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad
        for part in (gradient._indices(), gradient._values()) if gradient.is_sparse else (gradient,):
            self._log.claim(part, GRADIENTS, self._owners[parameter])


def track_memory(
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    fake: bool = False,
) -> MemoryProfile:
    """Measures the memory of one training step, on copies of model, optimizer and inputs.

    Two steps are taken, of which the second one counts, since the first makes the optimizer's state. The process's
    figures are those of `ProcessPeak`; the CUDA allocator's is without what was in use before the copies were made.

    Args:
        model: In the mode (train or eval) that it shall run in.
        inputs: A tensor or a tuple for positional arguments, a mapping for keyword arguments.
        optimizer: Of the model's parameters; None to stop after the backward pass.
        loss_fn: From the model's output to a scalar; see `take_step` for the default.
        fake: Whether to run on fake tensors, which takes no memory and little time, and has no figures of the process.

    Raises:
        ValueError: The loss is no scalar, the output holds nothing that a loss could be made of, or model and optimizer
            cannot be copied.
    """
    device = next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)
    allocated_before = 0 if device is None else torch.cuda.memory_allocated(device)
    process = ProcessPeak(device)
    with ExitStack() as surroundings:
        if fake:
            mode, model, optimizer, inputs = fake_copy(model, optimizer, inputs)
            surroundings.enter_context(mode)
        else:
            model, optimizer = copy_together(model, optimizer, {})
            inputs = copy.deepcopy(inputs)
            surroundings.enter_context(torch.random.fork_rng(devices=[] if device is None else [device]))
        take_step(model, inputs, optimizer, loss_fn)
        with nullcontext() if fake else process, MemoryTracker(model, optimizer, inputs) as tracker:
            take_step(model, inputs, optimizer, loss_fn)
    cuda_peak = process.cuda_peak_bytes
    return dataclasses.replace(
        tracker.result(),
        cuda_peak_bytes=None if cuda_peak is None else cuda_peak - allocated_before,
        peak_rss_bytes=process.peak_rss_bytes,
        rss_growth_bytes=process.rss_growth_bytes,
    )
