"""Define the records of runs and of cost analyses, and read and write them. Each record is one JSON file.

`train.py` and `peft-edge study` write records, and `peft-edge report` and `peft-edge plan` read them.

A record of a run uses the blocks and field names of PEFT's `method_comparison`, and adds further fields. A value that
was not measured is null, never 0. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_edge.files import atomic_write

logger = logging.getLogger(__name__)

SUCCESS = "success"
FAILED = "failed"
CANCELED = "canceled"
DIVERGED = "diverged"

JsonObject = dict[str, Any]
M = TypeVar("M", bound="JsonModel")


class UnknownFieldError(ValueError):
    """Raised for JSON whose only mistakes are unknown fields; a newer peft-edge has probably written this JSON."""


class JsonModel(BaseModel):
    """An object in a JSON file. Unknown fields and missing required fields are errors."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """Return the object as JSON text.

        Raises:
            ValueError: If a number is infinite or NaN, which JSON cannot represent.
        """
        return json.dumps(self.model_dump(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls: type[M], text: str | bytes) -> M:
        """Create an object of this class from JSON text.

        Raises:
            ValueError: If a required field is missing or a field has an invalid value. The message names all wrong
                fields.
            UnknownFieldError: If unknown fields are the only mistake.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc'])) or 'text'}: {each['msg']}" for each in error.errors()]
            is_newer = all(each["type"] == "extra_forbidden" for each in error.errors())
            kind = UnknownFieldError if is_newer else ValueError
            raise kind(f"not a {cls.__name__}: {'; '.join(wrong)}") from error


class RunInfo(JsonModel):
    """The configuration of a run, its start and its duration."""

    created_at: str
    """When the run started: ISO 8601, UTC."""
    experiment_name: str
    """`<method>/<name of the output folder>`, as in PEFT's `method_comparison`."""
    train_config: JsonObject
    """The complete configuration of the run, with defaults. The additional key `model_id` is the backbone's name."""
    peft_config: JsonObject | None = None
    """The configuration of the adapter; null for a method without an adapter."""
    total_time: float | None = None
    """Duration of the run, including the training of the source model and the evaluation.

    Null if the run was resumed after an interruption, or if it failed.
    """
    peft_branch: str | None = None
    """A field of PEFT's `method_comparison`, the git branch of PEFT. `train.py` does not set it, so it is null."""
    error_msg: str = ""
    """The traceback, if the run failed. If the run succeeded and the push to the Hub failed, the reason of that
    failure. Otherwise an empty string."""


class KernelChange(JsonModel):
    """How much adaptation changed the kernel of one convolution.

    The change is the kernel after adaptation minus the kernel before adaptation. It is reshaped to a matrix with one
    row for each output channel.
    """

    kind: str
    """`depthwise`, `pointwise`, `dense` (one group, kernel larger than 1 x 1) or `grouped`."""
    relative_norm: float
    """Frobenius norm of the change divided by the Frobenius norm of the kernel before adaptation."""
    stable_rank: float
    """Squared Frobenius norm of the change divided by its squared spectral norm; between 1 and the rank of the change
    (Rudelson and Vershynin 2007, arXiv math/0503442)."""


class TrainingCosts(JsonModel):
    """The costs of training on all targets (the domains to which the run adapts the model in turn).

    Times and FLOPs are summed over the targets. For each target, only the training with the selected learning rate
    counts. `total_s` is the sum of `step_s`, `loading_s`, `storing_s` and `statistics_s`.
    """

    total_s: float
    """Time of training without validation."""
    step_s: float
    """Time of the optimizer steps."""
    loading_s: float
    """Time in which training waited for batches of images or of stored features."""
    storing_s: float
    """Time to load the images and store their features (outputs of the frozen layers) for latent replay. If an earlier
    run has stored the features, the time that the earlier run took."""
    statistics_s: float
    """Time to load the images and estimate BatchNorm statistics."""
    validation_s: float
    """Time of validation after epochs, which `total_s` does not include."""
    flops: int | None
    """FLOPs of all optimizer steps, of storing features and of estimating statistics, summed over all processes. Null
    in two cases: steps were taken but none of them was profiled, or a profile has no FLOPs. The FLOPs of storing and
    estimating include only convolutions and matrix products."""
    process_peak_bytes: int | None
    """Peak physical memory of a training process since the start or the resumption of training, including validation
    and the storing of features; the maximum over processes and targets. It includes Python and its libraries, but not
    worker processes that load images. Null on Windows."""


class TrainInfo(JsonModel):
    """Costs and results of training."""

    status: str
    """`success`, `failed`, `canceled` or `diverged`."""
    train_time: float | None = None
    """Seconds of the optimizer steps (`step_s` of `costs`). For a method without gradients, the seconds in which it
    estimates statistics. The times of all targets are added. If several learning rates were tried for a target, only
    the time with the selected learning rate is included."""
    costs: TrainingCosts | None = Field(default=None, exclude_if=lambda value: value is None)
    """The costs of training. This field is absent if nothing was trained, and in records of earlier versions."""
    file_size: int | None = None
    """Bytes of the saved adapter, or of the saved model for a method without an adapter."""

    num_trainable_params: int | None = None
    num_total_params: int | None = None
    """`num_trainable_params` counts the trainable parameters of the adapted model, and `num_total_params` counts all
    parameters of the source model."""

    accelerator_memory_reserved_avg: int | None = None
    accelerator_memory_max: int | None = None
    accelerator_memory_reserved_99th: int | None = None
    """Fields of PEFT's `method_comparison`: mean, maximum and 99th percentile of the bytes that the accelerator's
    allocator reserved. `train.py` does not set these fields, so they are null."""

    metrics: list[JsonObject] = []
    """One entry per epoch and target (a domain that the run adapts to), followed by one entry with the test results
    before and after adaptation."""
    sweep: list[JsonObject] = []
    """One entry per target and tried learning rate. Its validation accuracy is null if training diverged."""
    replay: JsonObject | None = None
    """The size and cost of the features (outputs of the frozen layers) that were stored for the last target; null if
    training did not use latent replay."""
    checks: dict[str, float] = {}
    """Results of comparing logits. `reloaded_max_logit_difference` is the largest absolute difference between the
    logits of the trained model and those of the saved and reloaded model. `merged_max_logit_difference`, if present, is
    the largest absolute difference between the logits of the trained model and those of the merged model."""
    changes: dict[str, KernelChange] = {}
    """How much each convolution kernel changed, by module name. Unchanged convolutions are left out. The dict is empty
    if the adapter cannot be merged."""

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole training. In records without `costs`, only the seconds of the optimizer steps."""
        return self.train_time if self.costs is None else self.costs.total_s


class MetaInfo(JsonModel):
    """Descriptions of the machine, the model and the data, and the versions of the packages."""

    model_info: JsonObject
    dataset_info: JsonObject
    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str


class StepProfile(JsonModel):
    """The cost of a training step in one process: either of the whole step, or of all layers with the same LoRA rank.

    FLOPs and memory come from the sampled step with the highest memory peak. Times are medians over the sampled steps.
    Fields that only a whole step has are null in a profile with the scope `layers`.
    """

    process_index: int
    """The rank of the process, from 0."""
    scope: str
    """`step` for the whole step, `layers` for all layers whose adapter has the rank `lora_rank`."""
    lora_rank: int | None = None
    """Rank of the adapters; null without adapters, or for a whole step whose adapters have several ranks."""
    steps: int = 0
    """The number of sampled steps."""
    num_trainable_params: int | None = None
    """The number of trainable parameters of the model (scope `step`) or of the layers (scope `layers`)."""

    flops_forward: int | None = None
    flops_backward: int | None = None
    """FLOPs of convolutions, matrix products and attention in the forward and in the backward pass. A multiply-add
    counts as 2 FLOPs. The loss counts as a part of the forward pass."""

    flops_optimizer: int | None = None
    """All FLOPs of the optimizer step, including gradient clipping; null for layers."""

    flops_elementwise_forward: int | None = None
    flops_elementwise_backward: int | None = None
    """All other FLOPs of the forward and of the backward pass: activations, normalisation, pooling, sums."""

    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None
    """Seconds per step. `forward_s` includes the loss, `backward_s` includes gradient clipping. Null for layers."""

    samples_per_s: float | None = None
    """Samples of this process per step, divided by `forward_s + backward_s + optimizer_s`; null for layers."""
    memory_peak_bytes: int | None = None
    """Peak bytes of all live tensors. For layers: the bytes of the tensors of these layers at the peak of the step."""
    memory_peak_phase: str | None = None
    """The phase in which the peak occurs: `forward`, `backward` or `optimizer`; null for layers."""

    memory_parameters_bytes: int | None = None
    memory_buffers_bytes: int | None = None
    memory_gradients_bytes: int | None = None
    memory_activations_bytes: int | None = None
    memory_temporaries_bytes: int | None = None
    memory_optimizer_bytes: int | None = None
    """Bytes at the peak, by kind of tensor. Activations are the tensors that are saved for the backward pass.
    Temporaries are all tensors that belong to no other kind."""

    memory_forward_end_bytes: int | None = None
    """Bytes of all live tensors at the end of the forward pass. For layers: only the tensors of these layers."""
    cuda_peak_bytes: int | None = None
    """Peak bytes of CUDA's allocator in the step; null for layers, without CUDA, and for analyses on fake tensors."""
    peak_rss_bytes: int | None = None
    """Peak physical memory of the process in the step. If the system cannot reset its counter of the peak, the value is
    the peak since the process started.

    Null for layers, on Windows, and for analyses on fake tensors.
    """
    adapter_bytes: int | None = None
    """Bytes of the tensors in the saved adapter, or of the trainable parameters for a method without an adapter."""

    @property
    def flops(self) -> int | None:
        """All FLOPs of the step; None if a part was not measured."""
        parts = [value for name, value in vars(self).items() if name.startswith("flops_")]
        known = [value for value in parts if value is not None]
        return sum(known) if len(known) == len(parts) else None


class Record(JsonModel):
    """One run of `train.py`."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo

    profile: list[StepProfile] = []
    """For each process, one profile of the whole step and one profile for each LoRA rank. The profiled steps belong to
    the training on the last target. For a failed run, profiles may be missing."""

    @property
    def data_fingerprint(self) -> str | None:
        """The fingerprint (a hash) of the data of all domains. None for a run that failed."""
        return next((info["sha"] for info in self.meta_info.dataset_info.values()), None)

    @property
    def step(self) -> StepProfile | None:
        """The first profile with the scope `step`, normally that of process 0. None if no step was sampled."""
        return next((row for row in self.profile if row.scope == "step"), None)


class CostRecord(JsonModel):
    """The cost of a training step, computed from tensor shapes alone."""

    created_at: str
    """When the step was analysed: ISO 8601, UTC."""
    network: str
    """The name of a timm model or of a Transformers configuration."""
    kind: str
    """`standard`, `depthwise` (a network with depthwise convolutions) or `transformer`."""
    method: str
    """A key of `METHODS`, such as `full`, `lora` or `dora`."""
    setting: JsonObject
    """The options of the analysis, such as the LoRA rank: all fields of `CostSetting` except `method`. An option that
    does not apply is null."""
    num_total_params: int
    """The number of parameters of the network with its adapters."""

    profile: StepProfile
    package_info: dict[str, str | None]


def read_record(file: Path, kind: type[M]) -> M | None:
    """Read the record in `file` as an object of the class `kind`, or return None if `file` does not exist.

    Raises:
        ValueError: If the file is damaged, or a newer version of this package has written it. The message names the
            file.
    """
    try:
        return kind.from_json(file.read_bytes()) if file.exists() else None
    except UnknownFieldError as error:
        raise ValueError(
            f"{file} has fields that this version of peft-edge does not know, so a newer one has written it: upgrade "
            f"peft-edge, or use another folder ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: move it away, and the command that wrote it writes it again ({error})"
        ) from error


def add_record(folder: Path, name: str, record: Record | CostRecord) -> Path:
    """Write a record to the file `<folder>/<name>.json`, as one line of JSON. Return the path of the file.

    If the file exists, it is replaced.
    """
    file = folder / f"{name}.json"
    with atomic_write(file) as unfinished:
        text = json.dumps(record.model_dump(), separators=(",", ":"), allow_nan=False)
        unfinished.write_text(f"{text}\n", encoding="utf-8")
    return file


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The records in a folder. The keys of both dicts are paths of files, relative to the folder, in sorted order."""

    runs: dict[str, Record] = field(default_factory=dict)
    """Runs of `train.py`, including failed runs."""
    costs: dict[str, CostRecord] = field(default_factory=dict)
    """Analyses of training steps."""

    @property
    def finished(self) -> dict[str, Record]:
        """The runs that succeeded."""
        return {name: run for name, run in self.runs.items() if run.train_info.status == SUCCESS}


def read_archive(folder: Path) -> Archive:
    """Read all records of runs and cost analyses in a folder and its subfolders. Of equal records, read only one.

    JSON files that are not records, such as configurations, are ignored.

    Raises:
        ValueError: If there is no record, or if a record is damaged or was written by a newer version.
    """
    archive = Archive()
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.json")):
        record = None if file.is_dir() else _find_record(file)
        # A study stores each record twice: in the folder of the run and, without local paths, in the results folder.
        if record is None or (key := _identity(record)) in seen:
            continue
        seen.add(key)
        name = file.relative_to(folder).as_posix()
        if isinstance(record, Record):
            archive.runs[name] = record
        else:
            archive.costs[name] = record
    if not archive.runs and not archive.costs:
        raise ValueError(
            f"{folder} holds no record: name a folder with record.json files of train.py, or with results of "
            "peft-edge study"
        )
    return archive


def _identity(record: Record | CostRecord) -> str:
    if isinstance(record, CostRecord):
        return record.model_dump_json()
    run = record.run_info
    return f"{run.experiment_name} {run.created_at} {record.train_info.model_dump_json()}"


def _find_record(file: Path) -> Record | CostRecord | None:
    """Return the record in a file, or None if the file contains no record.

    If the file is not valid JSON and does not look like a damaged record, log a warning and return None.

    Raises:
        ValueError: If the file is a damaged or incomplete record, or was written by a newer version of this package.
    """
    # Records of PEFT's `method_comparison` have the same blocks, but their `train_config` has none of these keys.
    keys = {"method", "norm", "backbone", "data", "adapter"}
    content = file.read_bytes()
    try:
        block = json.loads(content)
    except (ValueError, RecursionError) as error:
        if file.name == "record.json" or any(key in content for key in (b'"run_info"', b'"network"')):
            raise ValueError(f"{file} is a record that is cut short or damaged: move it away ({error})") from error
        logger.warning("%s is no JSON, and was left out: %s", file, error)
        return None
    try:
        is_cost = {"network", "method", "profile"}.issubset(block)
        is_run = "train_info" in block and not keys.isdisjoint(block["run_info"]["train_config"])
        missing = sorted(keys.difference(block["run_info"]["train_config"])) if is_run else []
    except (KeyError, TypeError):  # other JSON files, such as configurations, are no records
        return None
    if missing:
        raise ValueError(
            f"{file} is a record whose run_info.train_config lacks {', '.join(missing)}, so it is damaged, or another "
            "version of peft-edge has written it: move it away, or install that version"
        )
    if is_cost:
        return read_record(file, CostRecord)
    return read_record(file, Record) if is_run else None


def package_info(*more: str) -> dict[str, str | None]:
    """Return a dict of package versions with keys such as `torch-version`.

    The dict contains the packages that affect results, and the packages `more`. The version of a package that is not
    installed is None.
    """
    names = ("accelerate", "datasets", "peft", "timm", "torch", "torchvision", "transformers", *more)
    return {f"{name}-version": _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an extra that is not installed
        return None


def system_info(**more: str) -> dict[str, str]:
    """Return a dict that describes the operating system and the processor, and also has the entries `more`."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "version": platform.version(),
        "machine": platform.machine(),
        "processor": platform.processor() or _cpu_model(),
        **more,
    }


def _cpu_model() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def load_average() -> float | None:
    """Return the mean number of runnable processes in the last minute, or None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
