"""Measure the peak memory of a training step, by kind of tensor and by module.

`track_memory` measures a step on copies, with real or fake tensors. `MemoryTracker` measures the steps inside a `with`
block. Both of them add up the bytes of the storages of live tensors. `ProcessPeak` reads the peak memory of the process
and of the CUDA allocator.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import re
import sys
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer

from peft_edge._compat import DispatchMode, leaves, sparse_parts
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
MEMORY_KINDS = (PARAMETERS, BUFFERS, GRADIENTS, ACTIVATIONS, TEMPORARIES, OPTIMIZER_STATE)

KindBytes = dict[str, int]
"""The bytes of tensors of each kind. The keys are `MEMORY_KINDS`, which `MemoryProfile` explains."""


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of tensors by kind; tensors that share a storage count once.

    The kinds are:

    - `parameters`: trainable and frozen parameters of the model.
    - `buffers`: all buffers of the model.
    - `gradients`: tensors that became the `grad` of a parameter.
    - `activations`: the inputs, and tensors that were created in the forward pass and are alive at its end. The forward
      pass ends before the first operator of the backward pass. Without a backward pass, it ends with the `with` block.
    - `temporaries`: all other tensors, such as recomputed activations and gradients of activations.
    - `optimizer`: the state of the optimizer.

    Only bytes of tensors count. The workspaces of operators, and bytes that an allocator adds by rounding or keeps for
    later, appear only in `cuda_peak_bytes`, `peak_rss_bytes` and `rss_growth_bytes`.

    >>> profile = track_memory(nn.Linear(4, 2), torch.ones(3, 4), fake=True)
    >>> profile.peak["parameters"], profile.peak["gradients"]
    (40, 40)
    >>> sum(profile.peak.values()) == profile.peak_bytes
    True
    """

    peak_bytes: int
    """The highest number of live bytes at any time in the step."""
    peak: KindBytes
    """The live bytes of each kind at the peak."""
    peak_phase: str
    """The phase in which the peak occurs: `forward`, `backward` or `optimizer`."""
    forward_end_bytes: int
    """Live bytes at the end of the forward pass. If several forward passes run, the maximum over these passes."""
    forward_end: KindBytes
    """The live bytes of each kind, at the time of `forward_end_bytes`."""
    start_bytes: int
    """Live bytes before the first operator: the model, its gradients, the optimizer's state and the inputs."""
    peak_by_module: dict[str, KindBytes] = field(repr=False)
    """Bytes of each module at the peak, by module name. A module includes its submodules; `""` is the whole model.

    A parameter, its gradient and its optimizer state belong to the module that holds the parameter. A shared parameter
    belongs to the innermost module that contains all its holders. Other tensors belong to the module that created them.
    Inputs, the loss and temporaries of the optimizer belong to no module, so only `peak` includes them.
    """
    forward_end_by_module: dict[str, KindBytes] = field(repr=False)
    """Bytes of each module at the time of `forward_end_bytes`, assigned to modules by the rules of `peak_by_module`."""
    cuda_peak_bytes: int | None = None
    """Peak of the CUDA allocator in bytes.

    It is None without CUDA, for a step on fake tensors, and in the result of `MemoryTracker`.
    """
    peak_rss_bytes: int | None = None
    """Peak of the physical memory of the process in bytes.

    It is None on Windows, for a step on fake tensors, and in the result of `MemoryTracker`.
    """
    rss_growth_bytes: int | None = None
    """`peak_rss_bytes` minus the physical memory of the process before the step.

    It is None if `peak_rss_bytes` is None, or if the system cannot reset the peak before the step.
    """


def track_memory(
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    loss_fn: LossFn | None = None,
    fake: bool = False,
) -> MemoryProfile:
    """Measure the memory of one training step, on copies of the model, the optimizer and the inputs.

    Two steps run, and only the second is measured, because the first creates the optimizer's state. `cuda_peak_bytes`
    of the result excludes memory that was allocated before the model was copied.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> profile = track_memory(model, torch.ones(32, 16), optimizer=torch.optim.AdamW(model.parameters()))
    >>> profile.forward_end["parameters"], profile.forward_end["optimizer"]  # two averages and four step counters
    (2176, 4368)

    `fake=True` uses fake tensors, which need almost no memory. The memory of the process and of CUDA is then not
    measured. See `count_flops` for `model`, `inputs`, `optimizer` and `loss_fn`.

    Raises:
        ValueError: If the loss is not a scalar, if the default loss finds no tensor in the output, if the model or the
            optimizer cannot be copied, or if a step on fake tensors reads a tensor's value.
    """
    device = cuda_device(model)
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


class MemoryTracker(DispatchMode):
    """Track the memory of the training steps inside a `with` block.

    Parameters may be frozen, tied or views of one another. Tensors may be fake. Only tensors on the devices of the
    parameters count. torch's own `torch.distributed._tools.mem_tracker.MemTracker` raises an error for frozen
    parameters.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inputs = torch.ones(3, 4)
    >>> with MemoryTracker(model, inputs=inputs) as tracker:
    ...     model(inputs).sum().backward()
    >>> tracker.result().forward_end["activations"]  # the inputs, the output of ReLU, the loss and its gradient
    152

    Args:
        model: The model, whose parameters, buffers and existing gradients count from the start.
        optimizer: The optimizer whose state is measured. If it is None, the state of any optimizer counts as
            temporaries.
        inputs: The inputs of the model, which also count from the start. Other tensors count from the first operator
            that uses or creates them.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, inputs: Inputs | None = None) -> None:
        super().__init__()
        self._modules, self._optimizer, self._inputs = dict(model.named_modules()), optimizer, inputs
        self._owners: dict[Tensor, str | None] = {}
        self._location = StepLocation(model)
        self._log = StorageLog({parameter.device for parameter in model.parameters()})
        self._start = 0
        self._forward_ends: list[int] = []
        self._entered = ExitStack()

    def __enter__(self) -> MemoryTracker:
        self._assign_state()
        self._log.observe(leaves(self._inputs))
        self._inputs = None
        self._start = len(self._log.events)
        for parameter in self._owners:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._assign_gradient)
                self._entered.callback(handle.remove)
        self._entered.enter_context(self._location)
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._entered.close()
        self._assign_state()
        if not self._forward_ends:
            self._end_forward()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        """Run an operator and log the storages of its arguments and results."""
        phase, module = self._location.locate()
        if phase == BACKWARD and self._log.phase == FORWARD:
            self._end_forward()
        self._log.phase = phase
        # A storage that first appears as an argument was not created in the model, so it belongs to no module.
        self._log.observe(args)
        result = func(*args, **(kwargs or {}))
        self._log.observe(result, module)
        return result

    def result(self) -> MemoryProfile:
        """Return the measurements. Call this after the `with` block has ended."""
        totals = self._log.totals()
        peak_at = max(range(len(totals)), key=totals.__getitem__)
        forward_end_at = max(self._forward_ends, key=totals.__getitem__)
        peak, peak_by_module = self._live_bytes(peak_at)
        forward_end, forward_end_by_module = self._live_bytes(forward_end_at)
        return MemoryProfile(
            peak_bytes=totals[peak_at],
            peak=peak,
            peak_phase=self._log.events[peak_at - 1].phase if peak_at else FORWARD,
            forward_end_bytes=totals[forward_end_at],
            forward_end=forward_end,
            start_bytes=totals[self._start],
            peak_by_module=peak_by_module,
            forward_end_by_module=forward_end_by_module,
        )

    def _live_bytes(self, events: int) -> tuple[KindBytes, dict[str, KindBytes]]:
        total = dict.fromkeys(MEMORY_KINDS, 0)
        by_module = {name: dict.fromkeys(MEMORY_KINDS, 0) for name in self._modules}
        for storage, change, _ in self._log.events[:events]:
            total[storage.kind] += change
            for name in ancestors(storage.module):
                by_module[name][storage.kind] += change
        return total, by_module

    def _end_forward(self) -> None:
        self._forward_ends.append(len(self._log.events))
        self._log.end_forward()

    def _assign_state(self) -> None:
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners[parameter] = innermost_around(name, self._owners.get(parameter, name))
            for buffer in module.buffers(recurse=False):
                self._log.assign(buffer, BUFFERS, name)
        for parameter, owner in self._owners.items():
            self._log.assign(parameter, PARAMETERS, owner)
            self._assign_gradient(parameter)
        state = {} if self._optimizer is None else self._optimizer.state
        for parameter, values in state.items():
            for leaf in leaves(values):
                if isinstance(leaf, Tensor):
                    self._log.assign(leaf, OPTIMIZER_STATE, self._owners.get(parameter))

    def _assign_gradient(self, parameter: Tensor) -> None:
        if (gradient := parameter.grad) is not None:
            for part in sparse_parts(gradient) if gradient.is_sparse else (gradient,):
                self._log.assign(part, GRADIENTS, self._owners[parameter])


class LoggedStorage(weakref.ref[UntypedStorage]):
    """A weak reference to a storage in the log. Its callback runs when Python or C++ frees the storage."""

    bytes: int
    key: int
    kind: str
    module: str | None
    phase: str


class Event(NamedTuple):
    """The creation, resizing or release of a storage in `phase`. The number of live bytes changes by `change`."""

    storage: LoggedStorage
    change: int
    phase: str


class StorageLog:
    """Log the storages of tensors as events that add or remove bytes. A tensor and its views have one storage.

    The kind of a storage may change after its creation. For example, `end_forward` turns live temporaries of the
    forward pass into activations. Storages on devices outside `devices` are ignored, unless `devices` is empty.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self.phase = FORWARD  # the phase of new storages and events; the caller sets it
        self._devices = devices
        self._live: dict[int, LoggedStorage] = {}
        self.events: list[Event] = []

    def totals(self) -> list[int]:
        """Return the live bytes before the first event and after each event."""
        return [0, *accumulate(event.change for event in self.events)]

    def observe(self, value: object, module: str | None = None) -> None:
        """Log the new and resized storages of all tensors in `value`.

        `value` is a tensor, or a list or tuple that may be nested. New storages belong to `module`.
        """
        if isinstance(value, Tensor):
            self._observe_tensor(value, module)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.observe(item, module)

    def assign(self, tensor: Tensor, kind: str, owner: str | None) -> None:
        """Set the kind of a tensor's storage to `kind`, and its module to `owner`.

        Only the first call for a storage sets the kind. After a later call with the same kind, the storage belongs to
        the innermost module that contains all owners. A later call with another kind changes nothing.
        """
        storage = self._observe_tensor(tensor, None)
        if storage is None:
            return
        if storage.kind in (ACTIVATIONS, TEMPORARIES):
            storage.kind, storage.module = kind, owner
        elif storage.kind == kind:
            storage.module = innermost_around(storage.module, owner)

    def end_forward(self) -> None:
        """Change the kind of live temporaries of the forward pass to activations."""
        for storage in self._live.values():
            if storage.kind == TEMPORARIES and storage.phase == FORWARD:
                storage.kind = ACTIVATIONS

    def _observe_tensor(self, tensor: Tensor, module: str | None) -> LoggedStorage | None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            # A sparse tensor has no storage of its own. Only its indices and its values have one.
            return None
        key, size = id(storage), storage.nbytes()
        entry = self._live.get(key)
        if entry is None:
            # Compare the device of the tensor, because the storage of a fake tensor is always on the meta device.
            if self._devices and tensor.device not in self._devices:
                return None
            entry = self._live[key] = LoggedStorage(storage, self._log_free)
            entry.key, entry.bytes, entry.kind = key, 0, TEMPORARIES
            entry.phase, entry.module = self.phase, module
        if size != entry.bytes:
            self.events.append(Event(entry, size - entry.bytes, self.phase))
            entry.bytes = size
        return entry

    def _log_free(self, entry: LoggedStorage) -> None:
        del self._live[entry.key]
        self.events.append(Event(entry, -entry.bytes, self.phase))


def innermost_around(module: str | None, other: str | None) -> str | None:
    """Return the name of the innermost module that contains `module` and `other`, or None if either is None.

    A module contains itself.
    """
    if module == other:
        return module
    around = set(ancestors(other))
    return next((name for name in ancestors(module) if name in around), None)


def cuda_device(model: nn.Module) -> torch.device | None:
    """Return the device of the model's first CUDA parameter, or None if no parameter is on a CUDA device."""
    return next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)


class ProcessPeak:
    """Measure the peak memory of this process inside a `with` block. Blocks may be nested.

    At its start, a block resets the peak counters of CUDA and, on Linux, of the process. The attributes below are
    None until the block ends or an inner block starts.

    The process grows by more than the bytes of its tensors, because malloc cannot reuse all freed memory. In training
    steps with glibc, the process grew by up to 75 % more than the bytes of the tensors, and with the environment
    variable `MALLOC_MMAP_THRESHOLD_=65536` by up to 5 % more.
    """

    peak_rss_bytes: int | None = None
    """Peak of the process's physical memory in the block, in bytes. None on Windows.

    If the system cannot reset the peak counter, this is the peak since the process started.
    """
    rss_growth_bytes: int | None = None
    """`peak_rss_bytes` minus the physical memory at the start of the block. None if the peak counter was not reset."""
    cuda_peak_bytes: int | None = None
    """Peak of the CUDA allocator on `device` in the block, in bytes. None if `device` is None."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._rss_before: int | None = None

    def __enter__(self) -> ProcessPeak:
        # Store the current peaks in the outer blocks, because the reset below discards these peaks.
        for block in _open_peaks:
            block._read()
        _open_peaks.append(self)
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        release_free_memory()  # otherwise, the block would reuse freed memory, and the process would grow by less
        self._rss_before = psutil.Process().memory_info().rss if reset_peak_rss() else None
        return self

    def __exit__(self, *exception: object) -> None:
        _open_peaks.remove(self)
        self._read()

    def _read(self) -> None:
        """Update the peaks of this block if the peaks since the last reset are higher."""
        peak = peak_rss_bytes()
        self.peak_rss_bytes = None if peak is None else max(peak, self.peak_rss_bytes or 0)
        if self._rss_before is not None and self.peak_rss_bytes is not None:
            self.rss_growth_bytes = self.peak_rss_bytes - self._rss_before
        if self._device is not None:
            self.cuda_peak_bytes = max(torch.cuda.max_memory_allocated(self._device), self.cuda_peak_bytes or 0)


def release_free_memory() -> None:
    """Give freed memory, which malloc keeps for later, back to the system. Only glibc on Linux can do this."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


_open_peaks: list[ProcessPeak] = []

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int | None:
    """Return the peak of this process's physical memory in bytes, or None on Windows.

    The peak counts from the start of the process or, on Linux, from the last successful `reset_peak_rss`. psutil cannot
    read this value on Linux.
    """
    if _STATUS.exists() and (peak := re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    # POSIX leaves the unit open: macOS returns bytes, other systems kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> bool:
    """Reset the peak of the process's physical memory to the current value. Return whether the reset succeeded.

    The reset fails on all systems except Linux. On Linux, it fails in containers that do not allow it.
    """
    try:
        # According to proc(5), the value 5 resets only the peak.
        _CLEAR_REFS.write_text("5")
    except OSError:  # another system, or a container that does not allow it
        return False
    return True
