"""The record of a run: one JSON file with the blocks and field names of PEFT's `method_comparison`.

A figure that was not measured is null, never 0. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SUCCESS = "success"
FAILED = "failed"
CANCELED = "canceled"


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
class TrainInfo:
    """What training took and gave."""

    status: str
    """`success`, `failed` or `canceled`."""

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
    """Every learning rate that was tried, with its validation accuracy."""

    checks: dict[str, float] = field(default_factory=dict)
    """Largest differences of a logit after the saved adapter was reloaded and after it was merged."""


@dataclass(kw_only=True)
class MetaInfo:
    """Where it was run, and with which versions."""

    model_info: dict[str, Any]
    dataset_info: dict[str, Any]
    package_info: dict[str, str | None]
    system_info: dict[str, str]
    pytorch_info: str


@dataclass(kw_only=True)
class Record:
    """One run."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo

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
            return cls(**{name: kinds[name](**block) for name, block in blocks.items()})
        except (AttributeError, KeyError, TypeError) as error:
            expected = {name: [entry.name for entry in fields(kind)] for name, kind in kinds.items()}
            raise ValueError(f"not a record: {error}; expected the blocks and fields {expected}") from error
