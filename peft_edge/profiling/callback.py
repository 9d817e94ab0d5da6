"""The measuring of single steps of a real training: one is counted, another one is timed.

FLOPs, memory and seconds of training steps, for each process and each LoRA rank, while a training runs.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_edge.files import atomic_write, remove
from peft_edge.profiling.flops import FlopCounter
from peft_edge.profiling.memory import MemoryTracker, ProcessPeak
from peft_edge.profiling.step import BACKWARD, FORWARD, OPTIMIZER, PHASES
from peft_edge.profiling.tables import profile_table, step_rows
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


_LOGGED_OF_LAYERS = ("flops_forward", "flops_backward", "memory_peak_bytes", "adapter_bytes")
_NOT_LOGGED = ("process_index", "scope", "lora_rank", "steps", "memory_peak_phase")
_TIMES = [entry.name for entry in fields(StepTimes)]


class ProfilingCallback(TrainerCallback):
    """Measures a sample of the training steps, on every process.

    A sample is two steps of the training itself: in one, FLOPs are counted and memory is tracked; the next is timed.
    The first sample begins with the second step, when the optimizer's state exists. Between samples nothing is hooked,
    and what is trained is the same to the last bit as without the callback.

    Each process writes `<output_dir>/profile/<name>/process_<index>.json` after each sample, so what it has measured
    stays readable whatever happens to the others; a training that is resumed goes on from there. At the end the main
    process prints a table of all processes and writes `<output_dir>/profile/<name>.json`; without a name these are
    `profile/process_<index>.json` and `profile.json`.

    A step that torch.compile has compiled is counted as it is without; one that must be compiled whole (`fullgraph`)
    cannot be counted, and needs `every_n_steps=0`.

    Curves for the trackers, in `transformers.Trainer`:

        trainer.add_callback(ProfilingCallback(log=trainer.log))

    A training loop of one's own calls the events as `Trainer` does, with `model` and `optimizer`, and `close` when it
    ends, also by an exception.

    Attributes:
        rows: What this process has measured, and after the training what all have.

    Args:
        every_n_steps: Optimizer steps from the beginning of one sample to that of the next; 0 for no samples at all.
            A sample takes the time of some five further steps of a small network, so about half a percent of 1000.
        output_dir: Where files go, by default the `output_dir` of the training arguments.
        name: Tells several trainings in one folder apart.
        log: Called by the main process after each sample, with its figures.
        trace: Whether the step after the first sample goes to `<output_dir>/traces/<name>/process_<index>.json`, which
            chrome://tracing and Perfetto show.
        show_table: Whether the table is printed at the end.

    Raises:
        ValueError: `every_n_steps` is negative.
    """

    # Dispatch modes are the process's, and Trainer has no event for a training that fails in the middle of a step: what
    # that leaves entered is left when the next training begins.
    _entered: ClassVar[ExitStack] = ExitStack()

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
        self._every_n_steps = every_n_steps
        self._output_dir = output_dir
        self._name = name
        self._log = log
        self._trace = trace
        self._show_table = show_table
        self._begin([], [])

    def _begin(self, rows: list[StepProfile], times: list[StepTimes]) -> None:
        self.rows, self._times = rows, times
        self._steps_begun = 0
        self._step: Any = None
        self._planned: deque[AbstractContextManager[Any]] = deque()

    def close(self) -> None:
        """Ends the measuring of the step that is running, if one is measured."""
        self._entered.close()

    def on_train_begin(
        self, args: TrainingArguments | None, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clears the figures of an earlier training, or reads those of the one that is resumed."""
        self.close()
        self._begin([], [])
        if not self._every_n_steps:
            return
        process = PartialState()
        self._process_index = process.process_index
        self._root = Path(args.output_dir if self._output_dir is None else self._output_dir)  # type: ignore[union-attr]
        self._folder = self._root / "profile" / self._name
        if state.global_step == 0:
            if process.is_main_process:
                for old in self._folder.glob("process_*.json"):
                    remove(old)
                remove(self._whole_file)
            process.wait_for_everyone()
        elif self._file.exists():
            self._begin(*_read(self._file))

    def on_step_begin(
        self,
        args: TrainingArguments | None,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Begins to measure the step, if it is one of a sample."""
        is_due = self._steps_begun and self._every_n_steps and (self._steps_begun - 1) % self._every_n_steps == 0
        if is_due and not self._planned:
            self._planned.extend((CountedStep(model, optimizer), TimedStep(model)))
            if self._trace and self._steps_begun == 1:
                self._planned.append(_traced(self._root / "traces" / self._name / self._file.name))
        self._steps_begun += 1
        if self._planned:
            self._step = self._entered.enter_context(self._planned.popleft())

    def on_substep_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Ends the backward pass of a part of the batch."""
        self._enter_phase(None)

    def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Ends the backward pass, and begins the optimizer's step."""
        self._enter_phase(OPTIMIZER)

    def on_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Ends the optimizer's step."""
        self._enter_phase(None)

    def on_step_end(
        self, args: TrainingArguments | None, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the measuring of the step, and writes down what it gave."""
        self.close()
        step, self._step = self._step, None
        if isinstance(step, CountedStep):
            self._counted = step.rows(self._process_index)
            self._add(self._counted)
        elif isinstance(step, TimedStep):
            times = step.times()
            self._times.append(times)
            self._add([])
            self._send([self._counted[0].model_copy(update=vars(times)), *self._counted[1:]], control)

    def on_train_end(
        self, args: TrainingArguments | None, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gathers the figures of all processes."""
        self.close()
        if not self._every_n_steps:
            return
        self.rows = gather_object(self.rows)
        if PartialState().is_main_process and self.rows:
            _write(self._whole_file, [row.model_dump() for row in self.rows])
            if self._show_table:
                print(profile_table(self.rows))

    @property
    def is_measuring(self) -> bool:
        """Whether the step that is running is measured, and takes longer than others."""
        return self._step is not None

    @property
    def _whole_file(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}.json")

    @property
    def _file(self) -> Path:
        return self._folder / f"process_{self._process_index}.json"

    def _enter_phase(self, phase: str | None) -> None:
        if isinstance(self._step, TimedStep):
            self._step.enter(phase)

    def _add(self, counted: list[StepProfile]) -> None:
        """Takes in the rows of a counted step, if any, and the times so far, and writes the file."""
        steps = (self.rows[0].steps if self.rows else 0) + bool(counted)
        rows = max(filter(None, (self.rows, counted)), key=lambda rows: rows[0].memory_peak_bytes or 0)
        medians: dict[str, Any] = {name: _median([getattr(times, name) for times in self._times]) for name in _TIMES}
        self.rows = [row.model_copy(update={"steps": steps} | (medians if row.scope == "step" else {})) for row in rows]
        _write(self._file, {"rows": [row.model_dump() for row in self.rows], "times": [asdict(t) for t in self._times]})

    def _send(self, rows: list[StepProfile], control: TrainerControl) -> None:
        if self._log is None or not PartialState().is_main_process:
            return
        figures: dict[str, float] = {}
        for row in rows:
            prefix = "profile" if row.scope == "step" else f"profile/lora_rank_{row.lora_rank}"
            names = _LOGGED_OF_LAYERS if row.scope == "layers" else [n for n in StepProfile.model_fields if n not in _NOT_LOGGED]
            figures |= {f"{prefix}/{name}": value for name in names if (value := getattr(row, name)) is not None}
        # Trainer takes its `log` for the step's own, which would then be left out.
        should_log = control.should_log
        self._log(figures)
        control.should_log = should_log


def read_profile(folder: Path) -> list[StepProfile]:
    """Returns what the processes of a training have left below `folder`, finished or not."""
    rows = [row for file in folder.rglob("process_*.json") for row in _read(file)[0]]
    return sorted(rows, key=lambda row: row.process_index)


def _read(file: Path) -> tuple[list[StepProfile], list[StepTimes]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [StepProfile(**row) for row in content["rows"]], [StepTimes(**seconds) for seconds in content["times"]]
    except (ValueError, TypeError, KeyError) as error:
        # No training, and no report of why one has failed, shall fail for its figures.
        warnings.warn(f"{file} is damaged, and what it holds is left out: {error}", stacklevel=2)
        return [], []


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _traced(path: Path) -> Iterator[None]:
    # Asked for by default, CUDA is complained of where there is none.
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    with atomic_write(path) as unfinished:
        profiler.export_chrome_trace(str(unfinished))
