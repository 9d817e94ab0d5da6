"""Measure the training steps of the contenders (the methods to compare). Each contender runs in its own process."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from peft_edge.allocator import HUGE_PAGES_SWITCH, huge_page_state
from peft_edge.backbones import load_backbone
from peft_edge.bench.contenders import CONTENDERS, REFERENCE, Contender
from peft_edge.bench.results import BenchRecord, BenchRow, PhaseTimes
from peft_edge.methods import training_memory_format
from peft_edge.profiling.analysis import classification_loss
from peft_edge.profiling.callback import CountedStep
from peft_edge.profiling.memory import ProcessPeak, release_free_memory
from peft_edge.records import StepProfile, load_average, package_info, system_info

Setting = Mapping[str, str | int]

# The largest allowed difference between a logit of a contender and the same logit of the unchanged network, relative to
# the largest logit. The difference is not 0, because contenders execute operations in different orders, and rounding
# errors add up over the layers.
_TOLERANCE = 1e-3


def run_bench(
    backbone: str,
    contenders: Sequence[str] = tuple(CONTENDERS),
    *,
    num_classes: int = 10,
    batch_size: int = 16,
    image_size: int = 224,
    lora_rank: int = 4,
    rounds: int = 7,
    threads: int = 1,
    without_huge_pages: bool = True,
) -> BenchRecord:
    """Measure training steps of several contenders on one network, with random images, on the CPU.

    `backbone` is the name of a timm model, or the folder of a saved model. A model that is given by name has random
    weights. `contenders` are keys of `CONTENDERS`. Full fine-tuning is always measured, too.

    Each contender runs in a separate process, in which torch allocates large tensors in huge pages. First, the bench
    counts the FLOPs and the memory of the tensors in a step that is not timed. Then follow the rounds. In each round,
    each contender takes two steps, and the second step is timed. The order of the contenders is reversed after each
    round. If `without_huge_pages` is True, the bench then ends these processes, and repeats the rounds in processes
    without huge pages. A contender fails if it cannot be built, if its output differs from the network's output, or if
    one of its steps or its process fails. The field `error` of its row then contains the reason.

    Raises:
        ValueError: If the network is unknown, or cannot be trained on images of this size.
        RuntimeError: If full fine-tuning fails, or the process that loads the network dies.
    """
    created_at, started, load = datetime.now(timezone.utc), time.perf_counter(), load_average()
    names = list(dict.fromkeys([REFERENCE, *contenders]))
    setting: Setting = {
        "backbone": backbone,
        "num_classes": num_classes,
        "batch_size": batch_size,
        "image_size": image_size,
        "lora_rank": lora_rank,
        "rounds": rounds,
        "threads": threads,
    }
    choices = (True, False) if without_huge_pages else (True,)
    groups = []
    with (
        tempfile.TemporaryDirectory() as cache,
        tqdm(total=len(choices) * len(names) * (1 + rounds), leave=False, disable=None) as bar,
    ):
        # The groups run one after the other, because the processes of a group keep some memory until the group ends.
        for huge_pages in choices:
            with _Group(names, setting, cache, huge_pages=huge_pages) as group:
                for name in names:
                    bar.set_description(f"counting {name}")
                    group.begin(name, is_counted=huge_pages)
                    bar.update()
                for number in range(rounds):
                    bar.set_description(f"round {number + 1} of {rounds}")
                    for name in names if number % 2 == 0 else names[::-1]:
                        group.time(name)
                        bar.update()
                group.finish()
            groups.append(group)
    return BenchRecord(
        created_at=created_at.isoformat(timespec="seconds"),
        setting=dict(setting),
        rows=list(groups[0].rows.values()),
        rows_without_huge_pages=[row for group in groups[1:] for row in group.rows.values()],
        total_time=time.perf_counter() - started,
        load_average=[load, load_average()],
        package_info=package_info("lycoris-lora", "loralib"),
        system_info=system_info(cores=str(os.cpu_count()), huge_pages=groups[0].huge_pages),
        pytorch_info=torch.__config__.show(),
    )


class _Costs(NamedTuple):
    """The measurements of a contender before the first round."""

    profile: StepProfile | None
    """The costs of a step. None if the costs were not requested."""
    compile_s: float | None
    """Seconds of the first step if `torch.compile` compiles the model; otherwise None."""


class _Growth(NamedTuple):
    """The memory of a contender's process during all rounds, as measured by `ProcessPeak`."""

    rss_growth_bytes: int | None
    peak_rss_bytes: int | None


class _Failure(NamedTuple):
    """The reason why a contender or the network cannot be used."""

    message: str


Request = Literal["build and count", "build", "step", "finish"]
Reply = _Costs | PhaseTimes | _Growth | _Failure


class _Group:
    """One process for each contender, all with huge pages or all without. The processes end with the `with` block.

    The group starts a host process with the environment variables for huge pages. The host loads the network. On Linux,
    the host then forks itself for each contender. On other systems, the host starts a new process for each contender. A
    forked process starts at once, and shares the memory of the loaded libraries with the other processes.
    """

    def __init__(self, names: Sequence[str], setting: Setting, cache: str, *, huge_pages: bool) -> None:
        self.rows = {name: BenchRow(name=name, label=CONTENDERS[name].label) for name in names}
        self.huge_pages = "unknown"
        # torch reads these variables when it is imported, or before its first allocation.
        self._environment = {HUGE_PAGES_SWITCH: str(int(huge_pages)), "TORCHINDUCTOR_CACHE_DIR": cache}
        context = multiprocessing.get_context("spawn")
        self._control, control = context.Pipe()
        pipes = [context.Pipe() for _ in names]
        self._connections = {name: ours for name, (ours, _) in zip(names, pipes, strict=True)}
        self._theirs = [control, *(theirs for _, theirs in pipes)]
        self._host = context.Process(target=_host, args=(list(names), dict(setting), self._theirs))

    def __enter__(self) -> _Group:
        before = os.environ.copy()
        os.environ.update(self._environment)
        try:
            self._host.start()
        finally:
            for name in self._environment:
                os.environ.pop(name)
            os.environ.update(before)
        for connection in self._theirs:
            connection.close()
        try:
            reply: str | _Failure = self._control.recv()
        except EOFError as error:
            raise RuntimeError("the process that loads the network died, perhaps for lack of memory") from error
        if isinstance(reply, _Failure):
            raise ValueError(reply.message)
        self.huge_pages = reply
        return self

    def __exit__(self, *exception: object) -> None:
        self._control.close()
        self._host.join()

    def begin(self, name: str, *, is_counted: bool) -> None:
        """Build a contender, and store its compile time in its row. If `is_counted`, also store a profile of a step."""
        reply = self._ask(name, "build and count" if is_counted else "build")
        if isinstance(reply, _Costs):
            self.rows[name].profile, self.rows[name].compile_s = reply

    def time(self, name: str) -> None:
        """Let a contender take a timed step, and add the times to its row. Skip a contender that has failed."""
        reply = self._ask(name, "step")
        if isinstance(reply, PhaseTimes):
            self.rows[name].rounds.append(reply)

    def finish(self) -> None:
        """Complete the row of each contender that has not failed.

        Store the memory of the contender's process. Also store the ratios of the contender's step times to those of
        `REFERENCE`.
        """
        for name, row in self.rows.items():
            reply = self._ask(name, "finish")
            if isinstance(reply, _Growth):
                row.rss_growth_bytes = reply.rss_growth_bytes
                row.compare(self.rows[REFERENCE].rounds)
                if row.profile is not None:
                    row.profile.peak_rss_bytes = reply.peak_rss_bytes

    def _ask(self, name: str, request: Request) -> Reply:
        """Send a request to a contender's process, and return the reply.

        If the contender fails, store the error message in its row, and remove the row's measurements. The reply is a
        `_Failure` if the contender fails in this call, or if it failed in an earlier call. If `REFERENCE` (full
        fine-tuning) fails, raise a RuntimeError.
        """
        row = self.rows[name]
        if row.error:
            return _Failure(row.error)
        try:
            self._connections[name].send(request)
            reply: Reply = self._connections[name].recv()
        except (EOFError, OSError):  # the process has ended, which closes its end of the pipe
            reply = _Failure("its process died, perhaps for lack of memory")
        if isinstance(reply, _Failure):
            row.error, row.profile, row.rounds = reply.message, None, []
            if name == REFERENCE:
                raise RuntimeError(f"{row.label} failed: {row.error}")
        return reply


def _host(names: Sequence[str], setting: Setting, connections: Sequence[Connection]) -> None:
    """Load the network, and start a process for each contender. This function is the main function of the host process.

    The first of `connections` belongs to the host, and the others belong to the contenders. The host sends the parent
    process the result of `huge_page_state`, or a `_Failure` if the network cannot be loaded. When the parent process
    closes its end of the first connection, the host and the processes of the contenders end.
    """
    # A terminal sends Ctrl-C to all processes. Only the parent process should react, because it prints the message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # a process with several computing threads must not be forked
    torch.manual_seed(0)
    control, *others = connections
    try:
        network, images = _load(setting)
    except Exception as error:
        control.send(_failure(error))
        return
    is_forked = sys.platform == "linux"
    # macOS can fork, but its libraries may crash in the forked process. Windows cannot fork.
    if is_forked:
        process: type[BaseProcess] = multiprocessing.get_context("fork").Process
    else:
        process = multiprocessing.get_context("spawn").Process
    for number, (name, connection) in enumerate(zip(names, others, strict=True)):
        inherited = [control, *others[number + 1 :]] if is_forked else []
        arguments = (connection, inherited, name, network, images, setting)
        # A daemon ends together with its parent process.
        process(target=_contend, args=arguments, daemon=True).start()
        connection.close()
    control.send(huge_page_state())
    with suppress(EOFError):  # `recv` waits until the parent process closes its end
        control.recv()


def _load(setting: Setting) -> tuple[nn.Module, Tensor]:
    """Return the network and a batch of random images.

    Raises:
        ValueError: If the network is unknown, or cannot be trained on images of this size.
    """
    size = int(setting["image_size"])
    network = load_backbone(str(setting["backbone"]), int(setting["num_classes"]))
    images = torch.randn(int(setting["batch_size"]), 3, size, size)
    try:
        # Estimate the statistics of BatchNorm. Otherwise, the activations of a network with random weights and frozen
        # norms would vanish or overflow.
        update_bn([images], network)
    except RuntimeError as error:
        raise ValueError(f"{network.name_or_path} cannot be trained on images of {size} px: {error}") from error
    return network, images


def _failure(error: Exception) -> _Failure:
    return _Failure(" ".join(str(error).split()) or type(error).__name__)


def _contend(
    connection: Connection,
    inherited: Sequence[Connection],
    name: str,
    network: nn.Module,
    images: Tensor,
    setting: Setting,
) -> None:
    """Reply to the requests of a `_Group` for one contender, until the other end of the connection closes.

    This function is the main function of a contender's process. `inherited` contains connections of other processes,
    which were copied into this process when the host forked it.
    """
    # When a process ends, its connection closes. The parent process notices this only if no other process has an open
    # copy of this connection.
    for other in inherited:
        other.close()
    torch.set_num_threads(int(setting["threads"]))
    memory = ProcessPeak()
    steps: _Steps | None = None
    with suppress(EOFError):  # `recv` raises EOFError when the other end is closed
        while True:
            request: Request = connection.recv()
            reply: Reply
            try:
                if steps is None:
                    steps = _Steps(CONTENDERS[name], network, images, int(setting["lora_rank"]))
                    reply = steps.begin(is_counted=request == "build and count")
                    memory.__enter__()  # returns free memory to the system, and starts to measure
                elif request == "step":
                    gc.collect()  # otherwise Python may collect garbage during the timed step
                    steps.time()  # an untimed step allocates the memory that the timed step reuses
                    reply = steps.time()
                    release_free_memory()  # the other contenders need it
                else:
                    memory.__exit__()
                    reply = _Growth(memory.rss_growth_bytes, memory.peak_rss_bytes)
            except Exception as error:  # other packages may raise exceptions of any class
                reply = _failure(error)
            connection.send(reply)


class _Steps:
    """Build a contender, check its output, and run its steps. Call `begin` once before the first call of `time`.

    Raises:
        ValueError: If the output of the contender in eval mode differs from the output of the network.
    """

    def __init__(self, contender: Contender, network: nn.Module, images: Tensor, lora_rank: int) -> None:
        self._is_compiled = contender.is_compiled
        self._model, self._optimizer = contender.build(copy.deepcopy(network), lora_rank)
        is_training = {module: module.training for module in self._model.modules()}
        with torch.no_grad():
            expected, found = network.eval()(images[:2]), self._model.eval()(images[:2])
        for module, training in is_training.items():
            module.training = training
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= _TOLERANCE:
            raise ValueError(f"its output differs from the network's output by {difference:.0%} of the largest logit")
        self._images = images.to(memory_format=training_memory_format(self._model))

    def begin(self, *, is_counted: bool) -> _Costs:
        """Take the first step, and return its time if it compiles the model. If `is_counted`, also return a profile.

        The first step creates the optimizer's state. It also compiles the model if the contender uses `torch.compile`.
        For the profile, the contender takes a second step, whose FLOPs and memory of tensors are counted. A compiled
        step cannot be counted, because the counters are dispatch modes. In a dispatch mode, torch runs the original
        model instead of the compiled model. The profile of a compiled contender therefore contains only the number of
        trainable parameters.
        """
        if self._is_compiled:
            self._model.compile()
        start = time.perf_counter()
        self.time()
        compile_s = time.perf_counter() - start if self._is_compiled else None
        if not is_counted:
            return _Costs(None, compile_s)
        if self._is_compiled:
            trained = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
            return _Costs(StepProfile(process_index=0, scope="step", num_trainable_params=trained), compile_s)
        with CountedStep(self._model, self._optimizer) as counted:
            self.time()
        return _Costs(counted.rows(0)[0], None)

    def time(self) -> PhaseTimes:
        """Take a step and return the time of each phase."""
        start = time.perf_counter()
        loss = classification_loss(self._model(self._images))
        forward = backward = update = time.perf_counter()
        if self._optimizer is not None:
            loss.backward()
            backward = time.perf_counter()
            self._optimizer.step()
            self._optimizer.zero_grad()
            update = time.perf_counter()
        return PhaseTimes(forward_s=forward - start, backward_s=backward - forward, optimizer_s=update - backward)
