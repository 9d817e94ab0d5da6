"""The log of storages: when each was made and freed, of how many bytes it was, and what it turned out to be.

What the operating system and the CUDA allocator say of a process's memory, beside what the tracker adds up.

Memory of training steps: what is alive at the peak and at the end of the forward pass, of which kind and whose.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import sys
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_edge.profiling.step import (
    BACKWARD,
    FORWARD,
    Inputs,
    LossFn,
    StepLocation,
    ancestors,
    copy_together,
    fake_copy,
    take_step,
)

PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
ACTIVATIONS, TEMPORARIES, OPTIMIZER_STATE = "activations", "temporaries", "optimizer"
KINDS = (PARAMETERS, BUFFERS, GRADIENTS, ACTIVATIONS, TEMPORARIES, OPTIMIZER_STATE)


class Storage(weakref.ref[UntypedStorage]):
    """A storage's entry in the log. Being a weak reference, it learns of its storage's end, also inside C++."""

    __slots__ = ("bytes", "key", "kind", "module", "phase")

    bytes: int
    key: int
    kind: str
    module: str | None
    phase: str


class StorageLog:
    """Logs the storages of the tensors that it is shown, by the change in bytes that each event brings.

    A storage that views and tied parameters share is one. Its kind is decided with hindsight: whether it is an
    activation shows when the forward pass has ended, whether it is a gradient when it has become one.

    Attributes:
        phase: The phase that new storages are made in; to be kept up to date.
        module: The module that makes them, or None; likewise.

    Args:
        devices: Storages on other devices are left out; an empty set leaves out none.
    """

    def __init__(self, devices: set[Any]) -> None:
        self.phase = FORWARD
        self.module: str | None = None
        self._devices = devices
        self._live: dict[int, Storage] = {}
        self._events: list[tuple[Storage, int, str]] = []

    def __len__(self) -> int:
        return len(self._events)

    def totals(self) -> list[int]:
        """Returns the bytes alive before the first event and after each."""
        return [0, *accumulate(change for _, change, _ in self._events)]

    def phase_of(self, events: int) -> str:
        """Returns the phase that the last of so many events was in."""
        return self._events[events - 1][2] if events else FORWARD

    def alive(self, events: int) -> Counter[tuple[str | None, str]]:
        """Returns the bytes alive after so many events, by module and kind."""
        alive: Counter[tuple[str | None, str]] = Counter()
        for storage, change, _ in self._events[:events]:
            alive[storage.module, storage.kind] += change
        return alive

    def see(self, value: Any) -> None:
        """Logs the storages of a tensor or of nested lists and tuples of them, where they are new or were resized."""
        if isinstance(value, Tensor):
            self._see_tensor(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.see(item)

    def claim(self, tensor: Tensor, kind: str, owner: str | None) -> None:
        """Says what a tensor is and to which module it belongs; the first claim decides on the kind.

        What several modules own belongs to the innermost module around them.
        """
        storage = self._see_tensor(tensor)
        if storage is None:
            return
        if storage.kind in (ACTIVATIONS, TEMPORARIES):
            storage.kind, storage.module = kind, owner
        elif storage.kind == kind:
            storage.module = innermost_around(storage.module, owner)

    def end_forward(self) -> None:
        """Takes what the forward pass has left behind for activations."""
        for storage in self._live.values():
            if storage.kind == TEMPORARIES and storage.phase == FORWARD:
                storage.kind = ACTIVATIONS

    def _see_tensor(self, tensor: Tensor) -> Storage | None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            # A sparse tensor has none of its own; its indices and values have.
            return None
        key, size = id(storage), storage.nbytes()
        entry = self._live.get(key)
        if entry is None:
            # A fake storage is on the meta device, and only the tensor on the one that it stands for.
            if self._devices and tensor.device not in self._devices:
                return None
            entry = self._live[key] = Storage(storage, self._log_death)
            entry.key, entry.bytes, entry.kind = key, 0, TEMPORARIES
            entry.phase, entry.module = self.phase, self.module
        if size != entry.bytes:
            self._events.append((entry, size - entry.bytes, self.phase))
            entry.bytes = size
        return entry

    def _log_death(self, entry: Storage) -> None:
        del self._live[entry.key]
        self._events.append((entry, -entry.bytes, self.phase))


def innermost_around(module: str | None, other: str | None) -> str | None:
    """Returns the innermost module that contains both (or is one of) them; None if either is outside the model."""
    if module == other:
        return module
    around = set(ancestors(other))
    return next((name for name in ancestors(module) if name in around), None)


resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss_bytes() -> int | None:
    """Returns the physical memory that this process has now (resident set size); None where only Linux could tell."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int | None:
    """Returns the most physical memory that this process has had; None on Windows.

    Since its start, or on Linux since `reset_peak_rss`.
    """
    peak = _status_bytes("VmHWM")
    if peak is None and resource is not None:
        # POSIX leaves the unit open: macOS took bytes, everyone else kilobytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def reset_peak_rss() -> bool:
    """Sets the peak back to the memory that the process has now; returns whether the system let it (Linux may)."""
    try:
        # proc(5): 5 resets the peak, and nothing else.
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


class ProcessPeak:
    """Measures the peaks of this process inside its `with` block, of which there must be one at a time.

    Both counters of peaks are set back, so whoever else reads them finds what came after. The growth is more than what
    was alive by what malloc could not use again: for the tensors of a training step, under glibc, up to 75 % with its
    defaults and up to 5 % with `MALLOC_MMAP_THRESHOLD_=65536` in the environment.

    Attributes:
        peak_rss_bytes: The peak of the physical memory: in the block, or of the process so far where the counter cannot
            be set back; None on Windows.
        rss_growth_bytes: Its part above what the process had before the block. None where that cannot be told.
        cuda_peak_bytes: The peak of what the CUDA allocator gave out on `cuda_device`; None without one.

    Args:
        cuda_device: The CUDA device to watch, or None.
    """

    peak_rss_bytes: int | None = None
    rss_growth_bytes: int | None = None
    cuda_peak_bytes: int | None = None

    def __init__(self, cuda_device: torch.device | None = None) -> None:
        self._cuda_device = cuda_device
        self._rss_before: int | None = None

    def __enter__(self) -> ProcessPeak:
        if self._cuda_device is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda_device)
        # Memory that malloc kept of an earlier step would be used again, and not be seen to grow.
        _trim_heap()
        self._rss_before = rss_bytes() if reset_peak_rss() else None
        return self

    def __exit__(self, *exception: Any) -> None:
        self.peak_rss_bytes = peak_rss_bytes()
        if self._rss_before is not None and self.peak_rss_bytes is not None:
            self.rss_growth_bytes = self.peak_rss_bytes - self._rss_before
        if self._cuda_device is not None:
            self.cuda_peak_bytes = torch.cuda.max_memory_allocated(self._cuda_device)


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _trim_heap() -> None:
    """Gives the heap's free pages back to the system, where the C library is glibc."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


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
