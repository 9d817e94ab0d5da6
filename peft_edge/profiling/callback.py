"""Measure the FLOPs, memory and time of single steps in a real training run, on every process."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_edge._compat import leaves
from peft_edge.files import atomic_write, remove
from peft_edge.profiling.flops import FlopCounter
from peft_edge.profiling.memory import MemoryTracker, ProcessPeak, cuda_device
from peft_edge.profiling.step import BACKWARD, FORWARD, OPTIMIZER, PHASES
from peft_edge.profiling.tables import profile_table, step_rows
from peft_edge.records import StepProfile

_LOGGED_OF_LAYERS = ["flops_forward", "flops_backward", "memory_peak_bytes", "adapter_bytes"]
_NOT_LOGGED = {"process_index", "scope", "lora_rank", "steps", "memory_peak_phase"}


class _Measuring(threading.local):
    """The callbacks of this thread that are measuring a step.

    `Trainer` has no event for a run that fails inside a step. After such a failure, the dispatch modes of the
    measurement are still active in this thread. Therefore the next training run in this thread closes the measurements
    that are still open.
    """

    def __init__(self) -> None:
        self.callbacks: set[ProfilingCallback] = set()


_measuring = _Measuring()


class ProfilingCallback(TrainerCallback):
    """Measure two of every `every_n_steps` training steps, on every process.

    A sample consists of two consecutive steps: the first gives FLOPs and memory, the second gives times. The first
    sample consists of steps 2 and 3 after the start or the resumption, because step 1 creates the optimizer's state. No
    hooks run in steps that are not measured. The callback does not change the trained weights.

    After each measured step, every process writes its measurements (step profiles) to the file
    `<output_dir>/profile/<name>/process_<index>.json`. A resumed run continues this file. At the end, the main process
    writes the step profiles of all processes to `<output_dir>/profile/<name>.json`. Without a name, the files are
    `profile/process_<index>.json` and `profile.json`.

    A compiled step is counted in its uncompiled form. With `torch.compile(fullgraph=True)`, steps cannot be counted, so
    `every_n_steps` must be 0.

    In `transformers.Trainer`, `trainer.add_callback(ProfilingCallback(log=trainer.log))` also sends the measurements to
    the trackers. A training loop of your own must call the `on_...` methods as `Trainer` does. If a step fails, it must
    call `close`. For example:

    >>> import tempfile
    >>> model, state, control = nn.Linear(4, 2), TrainerState(), TrainerControl()
    >>> callback = ProfilingCallback(output_dir=tempfile.mkdtemp())
    >>> callback.on_train_begin(None, state, control)
    >>> for _ in range(2):
    ...     callback.on_step_begin(None, state, control, model=model)
    ...     model(torch.ones(3, 4)).mean().backward()
    ...     callback.on_step_end(None, state, control)
    >>> callback.rows[0].flops_forward
    48

    During the run, the attribute `rows` contains the step profiles (`StepProfile`) of this process. After the run, it
    contains the step profiles of all processes.

    Args:
        every_n_steps: Number of optimizer steps from the start of one sample to the start of the next; 0 for no
            samples. For a small network, a sample takes about as long as five steps, so training takes about half a
            percent longer with the default.
        output_dir: Folder for the folders `profile` and `traces`. None means `output_dir` of the training arguments.
        name: A name that distinguishes training runs with the same `output_dir`.
        log: Function that the main process calls after each sample with a dict from names to measurements.
        trace: Whether to trace the step after the first sample. The trace is written to
            `<output_dir>/traces/<name>/process_<index>.json`, in the format of chrome://tracing and Perfetto.
        show_table: Whether the main process prints the step profiles of all processes at the end.

    Raises:
        ValueError: If `every_n_steps` is negative.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        *,
        output_dir: str | Path | None = None,
        name: str = "",
        log: Callable[[dict[str, float]], None] | None = None,
        trace: bool = False,
        show_table: bool = True,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps is {every_n_steps}, expected a number of steps, or 0 for no samples")
        self._every_n_steps, self._output_dir, self._name = every_n_steps, output_dir, name
        self._log, self._trace, self._show_table = log, trace, show_table
        self._entered = ExitStack()
        self._begin([], [])

    def _begin(self, rows: list[StepProfile], times: list[StepTimes]) -> None:
        self.rows, self._times = rows, times
        self._steps_begun = 0
        self._step: object = None
        self._planned: deque[AbstractContextManager[object]] = deque()

    def close(self) -> None:
        """End the measurement of the current step, and cancel the measurements that are planned for the next steps."""
        self._end_step()
        self._planned.clear()

    def _end_step(self) -> object:
        _measuring.callbacks.discard(self)
        self._entered.close()
        step, self._step = self._step, None
        return step

    def on_train_begin(
        self, args: TrainingArguments | None, state: TrainerState, *arguments: object, **kwargs: object
    ) -> None:
        """End measurements that a failed run left open, and prepare the file for the measurements of this process.

        If `state.global_step` is 0, delete the files of an earlier run. Otherwise, continue the existing file.
        """
        for callback in list(_measuring.callbacks):
            callback.close()
        self._begin([], [])
        if not self._every_n_steps:
            return
        process = PartialState()
        self._process_index = process.process_index
        self._root = Path(args.output_dir if self._output_dir is None else self._output_dir)  # type: ignore[union-attr]
        folder = self._root / "profile" / self._name
        self._file, self._whole_file = folder / f"process_{process.process_index}.json", Path(f"{folder}.json")
        if state.global_step == 0:
            if process.is_main_process:
                for old in folder.glob("process_*.json"):
                    remove(old)
                remove(self._whole_file)
            process.wait_for_everyone()
        elif self._file.exists():
            self._begin(*_read(self._file))

    def on_step_begin(
        self, *arguments: object, model: nn.Module, optimizer: Optimizer | None = None, **kwargs: object
    ) -> None:
        """Start the measurement that is planned for this step, if there is one.

        Before that, plan two measurements every `every_n_steps` steps: FLOPs and memory of this step, and times of the
        next step. The first time, `trace` adds a third measurement: the trace of the step after these two steps.
        """
        is_due = self._steps_begun and self._every_n_steps and (self._steps_begun - 1) % self._every_n_steps == 0
        if is_due and not self._planned:
            self._planned.extend((CountedStep(model, optimizer), TimedStep(model)))
            if self._trace and self._steps_begun == 1:
                self._planned.append(_traced(self._root / "traces" / self._name / self._file.name))
        self._steps_begun += 1
        if self._planned:
            _measuring.callbacks.add(self)
            self._step = self._entered.enter_context(self._planned.popleft())

    def on_pre_optimizer_step(self, *arguments: object, **kwargs: object) -> None:
        """In a timed step, stop timing the backward pass and start timing the update."""
        if isinstance(self._step, TimedStep):
            self._step.enter(OPTIMIZER)

    def on_optimizer_step(self, *arguments: object, **kwargs: object) -> None:
        """In a timed step, stop timing the update."""
        if isinstance(self._step, TimedStep):
            self._step.enter(None)

    # With gradient accumulation, the event `on_substep_end` ends the backward pass of a micro-batch.
    on_substep_end = on_optimizer_step

    def on_step_end(self, args: object, state: object, control: TrainerControl, **kwargs: object) -> None:
        """If the step was measured, end the measurement, and write the results to the file of this process."""
        step = self._end_step()
        if isinstance(step, CountedStep):
            self._counted = step.rows(self._process_index)
            self._add(self._counted)
        elif isinstance(step, TimedStep):
            self._times.append(step.times())
            self._add([])
            step_row = StepProfile(**{**vars(self._counted[0]), **self._times[-1]._asdict()})
            self._send([step_row, *self._counted[1:]], control)

    def on_train_end(self, *arguments: object, **kwargs: object) -> None:
        """Gather the measurements (step profiles) of all processes.

        The main process writes the gathered profiles to a file and, if `show_table` is True, prints them.
        """
        self.close()
        if not self._every_n_steps:
            return
        self.rows = gather_object(self.rows)
        if PartialState().is_main_process and self.rows:
            _write(self._whole_file, [vars(row) for row in self.rows])
            if self._show_table:
                tqdm.write(profile_table(self.rows))

    @property
    def is_measuring(self) -> bool:
        """Whether the current step is being measured. A measured step is slower."""
        return self._step is not None

    def _add(self, counted: list[StepProfile]) -> None:
        """Replace `self.rows` by the new rows `counted` if the new rows have a higher memory peak than the old rows.

        `counted` may be empty. Afterwards, set the times in the first row to the medians of all timed steps. Write the
        rows and the times of all timed steps to the file of this process.
        """
        steps = (self.rows[0].steps if self.rows else 0) + bool(counted)
        rows = max(filter(None, (self.rows, counted)), key=lambda rows: rows[0].memory_peak_bytes or 0)
        self.rows = [StepProfile(**{**vars(row), "steps": steps}) for row in rows]
        for name in StepTimes._fields:
            if known := [value for times in self._times if (value := getattr(times, name)) is not None]:
                setattr(self.rows[0], name, median(known))
        times = [times._asdict() for times in self._times]
        _write(self._file, {"rows": [vars(row) for row in self.rows], "times": times})

    def _send(self, rows: list[StepProfile], control: TrainerControl) -> None:
        if self._log is None or not PartialState().is_main_process:
            return
        values: dict[str, float] = {}
        for row in rows:
            prefix = "profile" if row.scope == "step" else f"profile/lora_rank_{row.lora_rank}"
            names = _LOGGED_OF_LAYERS if row.scope == "layers" else [n for n in vars(row) if n not in _NOT_LOGGED]
            values |= {f"{prefix}/{name}": value for name in names if (value := getattr(row, name)) is not None}
        # `Trainer.log` sets `should_log` to False. Restore the old value, because Trainer would otherwise not log the
        # loss of this step.
        should_log = control.should_log
        self._log(values)
        control.should_log = should_log


def read_profile(folder: Path) -> list[StepProfile]:
    """Read the step profiles that the processes of a run wrote inside `folder`. Skip damaged files with a warning."""
    rows = [row for file in folder.rglob("process_*.json") for row in _read(file)[0]]
    return sorted(rows, key=lambda row: row.process_index)


def _read(file: Path) -> tuple[list[StepProfile], list[StepTimes]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [StepProfile(**row) for row in content["rows"]], [StepTimes(**seconds) for seconds in content["times"]]
    except (ValueError, TypeError, KeyError) as error:
        # A damaged profile must not stop a training run or the report of a failed run.
        warnings.warn(f"{file} is damaged and is ignored: {error}", stacklevel=2)
        return [], []


def _write(path: Path, content: object) -> None:
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _traced(path: Path) -> Iterator[None]:
    # By default the profiler requests CUDA, and warns if there is none.
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    with atomic_write(path) as unfinished:
        profiler.export_chrome_trace(str(unfinished))


class CountedStep(ExitStack):
    """Count the FLOPs and track the memory of the step in a `with` block. The step becomes several times slower."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        super().__init__()
        self._model = model
        self._flops, self._memory = FlopCounter(model), MemoryTracker(model, optimizer)
        self._process = ProcessPeak(cuda_device(model))

    def __enter__(self) -> CountedStep:
        for counter in (self._process, self._memory, self._flops):
            self.enter_context(counter)
        return self

    def rows(self, process_index: int) -> list[StepProfile]:
        """Return a row for the whole step, and a row for the layers of each LoRA rank in the model. Times are None."""
        process = self._process
        memory = replace(
            self._memory.result(), cuda_peak_bytes=process.cuda_peak_bytes, peak_rss_bytes=process.peak_rss_bytes
        )
        return step_rows(self._model, self._flops.result(), memory, process_index=process_index)


class StepTimes(NamedTuple):
    """Seconds of each phase, and samples per second.

    The time of a phase that did not run is None. `samples_per_s` is None if a phase did not run, or if the model had no
    input with a batch dimension.
    """

    forward_s: float | None
    backward_s: float | None
    optimizer_s: float | None
    samples_per_s: float | None


class TimedStep(ExitStack):
    """Measure the time of each phase of the step in a `with` block, with two hooks on the model.

    The forward phase lasts from the call of the model until the backward pass has computed the first gradient of a
    model output. Therefore it includes the loss, even if the loss is computed outside the model. The hooks start the
    forward and backward phases. The caller starts the optimizer phase with `enter`. With gradient accumulation, the
    times of all micro-batches are added.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._device = model, cuda_device(model)
        self._seconds, self._samples = dict.fromkeys(PHASES, 0.0), 0
        self._phase: str | None = None
        self._since = 0.0

    def __enter__(self) -> TimedStep:
        before = self._model.register_forward_pre_hook(self._enter_model, prepend=True, with_kwargs=True)
        for handle in (before, self._model.register_forward_hook(self._leave_model)):
            self.callback(handle.remove)
        return self

    def enter(self, phase: str | None) -> None:
        """End the running phase and start `phase`; None starts no phase."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def times(self) -> StepTimes:
        """Return the seconds of each phase and the samples per second of this process."""
        is_complete = self._samples and all(self._seconds.values())
        forward_s, backward_s, optimizer_s = (self._seconds[phase] or None for phase in PHASES)
        samples_per_s = self._samples / sum(self._seconds.values()) if is_complete else None
        return StepTimes(forward_s, backward_s, optimizer_s, samples_per_s)

    def _enter_model(self, model: nn.Module, arguments: object, keywords: object) -> None:
        tensors = (leaf for leaf in leaves((arguments, keywords)) if isinstance(leaf, Tensor) and leaf.dim())
        self._samples += next((len(tensor) for tensor in tensors), 0)
        if self._phase != FORWARD:
            self.enter(FORWARD)

    def _leave_model(self, model: nn.Module, inputs: object, output: object) -> None:
        if tensors := [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]:
            register_multi_grad_hook(tensors, lambda gradient: self.enter(BACKWARD), mode="any")
