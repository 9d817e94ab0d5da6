"""What a measurement was made with: the machine, and the versions of the packages.

What is written down of a run, and of an analysis: one JSON file each.

A run's has the blocks and field names of PEFT's `method_comparison`.

A figure that was not measured is null, never 0. Times are in seconds, sizes in bytes.

A folder of records, one JSON file each: what studies fill, and reports and plans read.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from peft_edge.files import atomic_write

_PACKAGES = ("accelerate", "datasets", "peft", "timm", "torch", "torchvision", "transformers")
_CPU_INFO = Path("/proc/cpuinfo")


def package_info(*more: str) -> dict[str, str | None]:
    """Returns the versions of the packages that results depend on, and of others; None for one that is missing."""
    return {f"{name}-version": _version(name) for name in (*_PACKAGES, *more)}


def system_info(**more: str) -> dict[str, str]:
    """Returns the names of the system and of its processor, and what else is given."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "version": platform.version(),
        "machine": platform.machine(),
        "processor": platform.processor() or _cpu_model(),
        **more,
    }


def load_average() -> float | None:
    """Returns how many processes wanted a core in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


SUCCESS = "success"
FAILED = "failed"
CANCELED = "canceled"
DIVERGED = "diverged"


@dataclass(kw_only=True)
class RunInfo:
    """What was run."""

    created_at: str
    """When the run started: ISO 8601, UTC."""

    experiment_name: str
    """`<method>/<name>`, as in PEFT's results."""

    train_config: dict[str, Any]
    """The resolved configuration, and `model_id`, the backbone."""

    peft_config: dict[str, Any] | None = None
    """The adapter's configuration; null for a method without an adapter."""

    total_time: float | None = None
    """Seconds of the whole run, source stage and evaluation included; null when it was done in several parts."""

    peft_branch: str | None = None
    """The branch of PEFT, for a checkout; null for a released version."""

    error_msg: str = ""
    """Why the run failed."""


@dataclass(kw_only=True)
class KernelChange:
    """How the update has changed the kernel of one convolution, read as a matrix (C_out, K)."""

    kind: str
    """`depthwise`, `pointwise`, `dense` (one group, several taps) or `grouped`."""

    relative_norm: float
    """The Frobenius norm of the change, over that of the kernel before."""

    stable_rank: float
    """The change's squared Frobenius norm over its squared spectral norm (Rudelson and Vershynin 2007, arXiv
    math/0503442): in how many directions it goes, from 1 to its rank."""


@dataclass(kw_only=True)
class TrainInfo:
    """What training took and gave."""

    status: str
    """`success`, `failed`, `canceled` or `diverged`."""

    train_time: float | None = None
    """Seconds of optimizer steps, evaluation excluded, of the adapter that was kept."""

    file_size: int | None = None
    """Bytes of the saved weights: the adapter's, or the model's for a method without an adapter."""

    num_trainable_params: int | None = None
    """Parameters that were trained."""

    num_total_params: int | None = None
    """Parameters of the backbone."""

    accelerator_memory_reserved_avg: int | None = None
    """Mean bytes that the accelerator's allocator held."""

    accelerator_memory_max: int | None = None
    """The most bytes that it held."""

    accelerator_memory_reserved_99th: int | None = None
    """The 99th percentile of what it held."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    """One entry an epoch, and at last the test results with and without the update."""

    sweep: list[dict[str, Any]] = field(default_factory=list)
    """Every learning rate that was tried, with its validation accuracy, which is null where training diverged."""

    replay: dict[str, Any] | None = None
    """What was stored to be trained on in the place of the images, of the last target; see `FeatureCache`. Null where
    the images themselves were trained on."""

    checks: dict[str, float] = field(default_factory=dict)
    """Largest differences of a logit after the saved adapter was reloaded and after it was merged."""

    changes: dict[str, KernelChange] = field(default_factory=dict)
    """By its name, every convolution whose kernel the merged update has changed; none where it cannot be merged."""


@dataclass(kw_only=True)
class MetaInfo:
    """Where it was run, and with which versions."""

    model_info: dict[str, Any]
    dataset_info: dict[str, Any]
    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str


@dataclass(kw_only=True)
class StepProfile:
    """What a training step costs one process: the whole step, or the layers of one LoRA rank in it.

    FLOPs and memory are those of one step, the one with the highest peak of all that were sampled; times are medians.
    """

    process_index: int
    """Which process, counted from 0."""

    scope: str
    """`step`, the whole step, or `layers`, the layers whose adapter has the rank `lora_rank`."""

    lora_rank: int | None = None
    """The rank of the adapters; null where there are none, and for a whole step where there are several ranks."""

    steps: int = 0
    """How many steps were sampled."""

    num_trainable_params: int | None = None
    """Parameters that are trained; for layers, theirs."""

    flops_forward: int | None = None
    """Convolutions, matrix products and attention, in the forward pass and the loss; a multiply-add is two."""

    flops_backward: int | None = None
    """The same in the backward pass."""

    flops_optimizer: int | None = None
    """All arithmetic of the update, clipping included; null for layers."""

    flops_elementwise_forward: int | None = None
    """Activations, normalisation, pooling, sums: everything else of the forward pass."""

    flops_elementwise_backward: int | None = None
    """The same of the backward pass."""

    forward_s: float | None = None
    """Seconds from the model's start to the start of the backward pass, the loss included; null for layers."""

    backward_s: float | None = None
    """Seconds of the backward pass, clipping included; null for layers."""

    optimizer_s: float | None = None
    """Seconds of the optimizer's step; null for layers."""

    samples_per_s: float | None = None
    """Samples of this process in a second of the three together; null for layers."""

    memory_peak_bytes: int | None = None
    """The most bytes of tensors that were alive at once; for layers, theirs at that moment."""

    memory_peak_phase: str | None = None
    """The phase in which that was: `forward`, `backward` or `optimizer`; null for layers."""

    memory_parameters_bytes: int | None = None
    """Parameters, trained or not, at the peak."""

    memory_buffers_bytes: int | None = None
    """Buffers at the peak."""

    memory_gradients_bytes: int | None = None
    """Gradients of parameters at the peak."""

    memory_activations_bytes: int | None = None
    """What the forward pass made and the backward pass still needs, at the peak."""

    memory_temporaries_bytes: int | None = None
    """Everything else at the peak."""

    memory_optimizer_bytes: int | None = None
    """The optimizer's state at the peak."""

    memory_forward_end_bytes: int | None = None
    """Bytes of all kinds at the end of the forward pass."""

    cuda_peak_bytes: int | None = None
    """The most bytes that CUDA's allocator had given out in the step; null for layers, and on other devices."""

    peak_rss_bytes: int | None = None
    """The most physical memory that the process had in the step, or until then where the system only tells that."""

    adapter_bytes: int | None = None
    """What the tensors of the saved adapter take; without an adapter, the trained parameters."""


@dataclass(kw_only=True)
class Record:
    """One run."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo

    profile: list[StepProfile] = field(default_factory=list)
    """What a step costs, for each process and each LoRA rank; of a run that failed, what was measured until then."""

    @property
    def step(self) -> StepProfile | None:
        """What a step costs the first process; None where none was sampled."""
        return next((row for row in self.profile if row.scope == "step"), None)

    def to_json(self) -> str:
        """Returns the record as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, or a block or a field is missing or unknown.
        """
        blocks = json.loads(text)
        kinds = {"run_info": RunInfo, "train_info": TrainInfo, "meta_info": MetaInfo}
        try:
            profile = [StepProfile(**row) for row in blocks.pop("profile", [])]
            train = blocks["train_info"]
            train["changes"] = {name: KernelChange(**row) for name, row in train.get("changes", {}).items()}
            return cls(**{name: kinds[name](**block) for name, block in blocks.items()}, profile=profile)
        except (AttributeError, KeyError, TypeError) as error:
            expected = {name: [entry.name for entry in fields(kind)] for name, kind in kinds.items()}
            raise ValueError(f"not a record: {error}; expected the blocks and fields {expected}") from error


@dataclass(kw_only=True)
class CostRecord:
    """What a training step costs, analysed from shapes alone."""

    created_at: str
    """When: ISO 8601, UTC."""

    network: str
    """What was analysed: a timm model, or the name of a Transformers configuration."""

    kind: str
    """`standard`, `depthwise` (a network with depthwise convolutions) or `transformer`."""

    method: str
    """`full`, `lora`, `dora` or another of `METHODS`."""

    setting: dict[str, Any]
    """LoRA rank, batch size, image size or tokens in a sequence, optimizer, accounting of FLOPs, norm, target modules,
    and the options of lean training; null for what does not apply."""

    num_total_params: int
    """Parameters of the network, adapters included."""

    profile: StepProfile
    """The step."""

    package_info: dict[str, str | None]
    """The versions that it was analysed with."""

    def to_json(self) -> str:
        """Returns the record as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CostRecord:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, or a field is missing or unknown.
        """
        block = json.loads(text)
        try:
            return cls(**{**block, "profile": StepProfile(**block["profile"])})
        except (KeyError, TypeError) as error:
            expected = [entry.name for entry in fields(cls)]
            raise ValueError(f"not the record of a cost: {error}; expected the fields {expected}") from error


R = TypeVar("R", Record, CostRecord)

# What tells our runs from PEFT's own records, which have the same blocks with another configuration.
_CONFIG_KEYS = {"method", "norm", "backbone", "data", "adapter"}


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The records of a folder, by their files' names relative to it, in the order of these."""

    runs: dict[str, Record] = field(default_factory=dict)
    """Runs of `train.py`, whatever became of them."""

    costs: dict[str, CostRecord] = field(default_factory=dict)
    """Analyses."""

    @property
    def finished(self) -> dict[str, Record]:
        """The runs that have succeeded."""
        return {name: run for name, run in self.runs.items() if run.train_info.status == SUCCESS}


def read_archive(folder: Path) -> Archive:
    """Reads every record in a folder and below it. Other JSON files, such as those of adapters, are passed over.

    Raises:
        ValueError: There is no record, or one is damaged; the message names the file.
    """
    archive = Archive()
    for file in sorted(folder.rglob("*.json")):
        name, record = file.relative_to(folder).as_posix(), _read(file)
        # A study keeps a record both in the folder of the run and, without local paths, among its results.
        if isinstance(record, Record) and not any(_is_same(record, other) for other in archive.runs.values()):
            archive.runs[name] = record
        elif isinstance(record, CostRecord) and record not in archive.costs.values():
            archive.costs[name] = record
    if not archive.runs and not archive.costs:
        raise ValueError(
            f"{folder} holds no record: name a folder with the record.json of runs of train.py, or the results of "
            "peft-edge study"
        )
    return archive


def read_record(file: Path, kind: type[R]) -> R | None:
    """Returns the record in a file; None if there is no file.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    try:
        return kind.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: delete it, and it is made anew ({error})") from error


def _is_same(one: Record, other: Record) -> bool:
    started, others_start = ((run.run_info.experiment_name, run.run_info.created_at) for run in (one, other))
    return started == others_start and one.train_info == other.train_info


def _read(file: Path) -> Record | CostRecord | None:
    try:
        block = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if _is_run(block):
        return read_record(file, Record)
    return read_record(file, CostRecord) if _is_cost(block) else None


def _is_run(block: Any) -> bool:
    try:
        return _CONFIG_KEYS.issubset(block["run_info"]["train_config"]) and "train_info" in block
    except (KeyError, TypeError):
        return False


def _is_cost(block: Any) -> bool:
    return isinstance(block, dict) and {"network", "method", "profile"}.issubset(block)


def add_record(folder: Path, name: str, record: Record | CostRecord) -> Path:
    """Writes a record to a file of its own, on one line: a study has hundreds of them.

    Args:
        folder: The archive.
        name: Of the file, without its ending; the same name replaces the record.
        record: What is written.

    Returns:
        The file.
    """
    file = folder / f"{name}.json"
    with atomic_write(file) as unfinished:
        unfinished.write_text(json.dumps(json.loads(record.to_json()), separators=(",", ":")) + "\n", encoding="utf-8")
    return file
