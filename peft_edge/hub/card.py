"""Build model cards of adapters and whole models. A card shows the base model, accuracy, cost and example code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from timm.models import get_pretrained_cfg

if TYPE_CHECKING:  # importing the package must not import pydantic
    from peft_edge.records import Record

CARD_NAME = "README.md"
PICTURE_NAME = "cost.png"

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_TAGS = {
    None: [],
    "CONV_LORA": ["peft", "CONV_LORA", "lora"],
    "CONV_ADAPTER": ["peft", "CONV_ADAPTER", "adapter"],
    "LORA": ["peft", "lora"],
}


@dataclass(frozen=True, kw_only=True)
class CardSubject:
    """The adapter or model that a card describes.

    Attributes:
        base: The base model, as in PEFT's `base_model_name_or_path`: a Hub id, a timm model name, or a local folder.
        architecture: The name of the timm architecture, or of the Python class if the base is not from timm.
        peft_type: The adapter's `peft_type`, such as `CONV_LORA`; None for a whole model.
        source: The Hub id from which the code examples of the card load the adapter or model.
        license: The Hub's identifier of a license. None means the license of timm's pretrained weights if the
            training run used these weights, and otherwise no license.
    """

    base: str
    architecture: str
    peft_type: str | None
    source: str = "path/or/hub-id/of/this/adapter"
    license: str | None = None

    @classmethod
    def from_model(cls, model: PeftModel, **more: str | None) -> CardSubject:
        """Return the subject for the active adapter of `model`. Keyword arguments are values of further fields."""
        config, base = model.peft_config[model.active_adapter], model.get_base_model()
        name = config.base_model_name_or_path or getattr(base, "name_or_path", None) or "unknown"
        architecture = getattr(base, "pretrained_cfg", {}).get("architecture", type(base).__name__)
        return cls(**{"base": name, "architecture": architecture, "peft_type": config.peft_type.value, **more})


def adapter_card(subject: CardSubject, record: Record | None = None, folder: Path | None = None) -> ModelCard:
    """Build the model card of an adapter or of a whole model.

    If `record` is given, the card also shows the accuracy and the cost of the recorded run. The record must come from
    `shareable`, which shortens local paths. If `folder` is given, a plot of the cost is saved there as `PICTURE_NAME`.
    No plot is saved if matplotlib is missing, or if the record contains no profile of a training step.
    """
    shown = subject.base if subject.base.startswith("timm/") else subject.architecture
    kind = "Model adapted from" if subject.peft_type is None else f"{subject.peft_type} adapter for"
    values = {"title": f"{kind} `{shown}`", "subject": subject, "peft_version": peft.__version__}
    if record is not None:
        values |= _results(record, folder)
    return ModelCard.from_template(_metadata(subject, record), str(_TEMPLATE), **values)


def _results(record: Record, folder: Path | None) -> dict[str, object]:
    """Return the values with which the card's template shows the results of a run.

    If `folder` is given, also save a plot of the cost there, as `adapter_card` describes.
    """
    # Imported here to keep the import of the package fast.
    from peft_edge.profiling.figures import save_cost_figure
    from peft_edge.profiling.tables import profile_table, text_table

    run, train = record.run_info.train_config, record.train_info
    accuracy: list[tuple[str, ...]] = [("test accuracy on", "before", "after")]
    for domain, metric in (("target", "test accuracy"), ("source", "source test accuracy")):
        before, after = (train.metrics[-1].get(name) for name in (f"{metric} without update", metric))
        accuracy.append((domain, *("-" if value is None else f"{value:.3f}" for value in (before, after))))
    cost = [
        ("trained parameters", f"{train.num_trainable_params or 0:,}"),
        ("parameters of the model", f"{train.num_total_params or 0:,}"),
        ("saved bytes", f"{train.file_size or 0:,}"),
        ("training seconds", f"{train.seconds or 0:.1f}"),
    ]
    picture = None
    steps = {f"process {row.process_index}": row for row in record.profile if row.scope == "step"}
    if steps and folder is not None:
        with suppress(ImportError):  # matplotlib is an optional dependency
            save_cost_figure(steps, folder / PICTURE_NAME, title="a training step")
            picture = PICTURE_NAME
    return {
        "run": run,
        "shift": _shift(run["data"]),
        "accuracy": text_table(accuracy),
        "cost": text_table(cost) + (f"\n\n{profile_table(record.profile)}" if record.profile else ""),
        "picture": picture,
    }


def _metadata(subject: CardSubject, record: Record | None) -> ModelCardData:
    """Return the metadata of the card: library, license, base model, tags, datasets and test results."""
    run = record.run_info.train_config if record is not None else {}
    is_pretrained = run.get("backbone", {}).get("pretrained", False)
    origin = get_pretrained_cfg(run["model_id"].removeprefix("timm/")) if is_pretrained else None
    data = str(run["data"]["name"]) if run else ""
    tags = {"image-classification", "peft-edge", "timm", *_TAGS.get(subject.peft_type, ["peft"])}
    return ModelCardData(
        library_name="peft" if subject.peft_type is not None else "timm",
        license=subject.license or getattr(origin, "license", None),
        # The Hub accepts only Hub ids as `base_model`, not local paths.
        base_model=subject.base if subject.base.startswith("timm/") else getattr(origin, "hf_hub_id", None),
        pipeline_tag="image-classification",
        tags=sorted(tags | ({run["method"]} if run else set())),
        datasets=[data] if "/" in data else None,
        model_name=f"{run['method']} of {subject.architecture}" if run else None,
        eval_results=_eval_results(record) if record is not None else None,
    )


def _eval_results(record: Record) -> list[EvalResult]:
    """Return the test accuracies after training, on target (new) images and on source (earlier) images.

    Accuracies that are None are left out.
    """
    data, measured = record.run_info.train_config["data"], record.train_info.metrics[-1]
    source = _label(data["name"], data.get("source_filters", []))
    domains = {"test accuracy": f"{source}, {_shift(data)}", "source test accuracy": f"{source}, source"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(data["name"]),
            dataset_name=name,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=metric,
            metric_value=measured[metric],
        )
        for metric, name in domains.items()
        if measured.get(metric) is not None
    ]


def _label(name: object, filters: Any) -> str:
    from peft_edge.data.folders import domain_label  # importing the package must not import datasets

    return domain_label(str(name), filters)


def _shift(data: Mapping[str, Any]) -> str:
    """Return a text that describes what a run adapted to. `data` is the section `data` of the run's configuration.

    If there are new classes, the text lists them. Otherwise, the text starts with the name of the shift. If there is no
    shift, it starts with the name of the dataset. The severity follows, unless it is None.
    """
    if data["new_classes"]:
        return f"new classes {', '.join(map(str, data['new_classes']))}"
    shift = _label(data["shift"] or data["name"], data.get("shift_filters", []))
    return shift + (f" (severity {data['severity']})" if data["severity"] is not None else "")


def shareable(record: Record) -> Record:
    """Return a copy of a record in which each local path is shortened to its last component."""
    return type(record).from_json(json.dumps(shorten_paths(json.loads(record.to_json()))))


def shorten_paths(value: object, key: str = "") -> object:
    """Return a copy of a JSON value in which each local path is shortened to its last component.

    If `value` is an entry of a JSON object, `key` is its key. The values of `output_dir` and `cache_dir` always count
    as local paths.
    """
    if isinstance(value, dict):
        return {shorten_paths(name): shorten_paths(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [shorten_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and _is_local_path(value, key) else value


def _is_local_path(text: str, key: str) -> bool:
    if key in ("output_dir", "cache_dir") or re.match(r"[/~.\\]|[A-Za-z]:[/\\]", text):
        return True
    # A text such as "owner/name" is the id of a dataset on the Hub, unless a file or folder has this path.
    return "/" in text and len(text) < 1000 and Path(text).exists()
