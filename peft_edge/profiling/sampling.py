"""The measuring of single steps of a real training: one is counted, another one is timed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from peft_edge.profiling.flops import FlopCounter
from peft_edge.profiling.location import BACKWARD, FORWARD, PHASES
from peft_edge.profiling.memory import MemoryTracker
from peft_edge.profiling.process_memory import ProcessPeak
from peft_edge.profiling.rows import step_rows
from peft_edge.records import StepProfile


class CountedStep:
    """Counts the FLOPs and tracks the memory of the step inside its `with` block, which takes several times as long.

    Args:
        model: The one that is trained, not wrapped for several processes.
        optimizer: The one that trains it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._flops = FlopCounter(model)
        self._memory = MemoryTracker(model, optimizer)
        self._process = ProcessPeak(_cuda_device(model))
        self._entered = ExitStack()

    def __enter__(self) -> CountedStep:
        for counter in (self._process, self._memory, self._flops):
            self._entered.enter_context(counter)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.close()

    def rows(self, process_index: int) -> list[StepProfile]:
        """Returns a row for the step, and one for the layers of each LoRA rank; all without times."""
        memory = replace(
            self._memory.result(),
            cuda_peak_bytes=self._process.cuda_peak_bytes,
            peak_rss_bytes=self._process.peak_rss_bytes,
        )
        return step_rows(self._model, self._flops.result(), memory, process_index=process_index)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of a step's phases, None for one that was not seen; the fields are those of `StepProfile`."""

    forward_s: float | None
    backward_s: float | None
    optimizer_s: float | None
    samples_per_s: float | None


class TimedStep:
    """Times the phases of the step inside its `with` block by two hooks on the model.

    The forward pass goes from the model's start until the first gradient reaches its output, so the loss belongs to it
    wherever it is computed. The others end when they are told to. Batches of gradient accumulation add up.

    Args:
        model: The one that is trained, not wrapped for several processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = _cuda_device(model)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._samples = 0
        self._phase: str | None = None
        self._since = 0.0
        self._hooks = ExitStack()

    def __enter__(self) -> TimedStep:
        before = self._model.register_forward_pre_hook(self._enter_model, prepend=True, with_kwargs=True)
        after = self._model.register_forward_hook(self._leave_model)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def enter(self, phase: str | None) -> None:
        """Ends the phase that is running, and starts another one, or none."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def times(self) -> StepTimes:
        """Returns the seconds of the phases, and the samples of this process in a second of them."""
        total = sum(self._seconds.values())
        is_whole = self._samples and all(self._seconds.values())
        return StepTimes(
            **{f"{phase}_s": seconds or None for phase, seconds in self._seconds.items()},
            samples_per_s=self._samples / total if is_whole else None,
        )

    def _enter_model(self, model: nn.Module, arguments: Any, keywords: Any) -> None:
        tensors = (leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor) and leaf.dim())
        self._samples += next((len(tensor) for tensor in tensors), 0)
        if self._phase != FORWARD:
            self.enter(FORWARD)

    def _leave_model(self, model: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if tensors:
            register_multi_grad_hook(tensors, lambda gradient: self.enter(BACKWARD), mode="any")


def _cuda_device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)
