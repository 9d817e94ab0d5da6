"""A record without what is only true, or only of concern, on this machine.

The model card: what was adapted, what it gained, what it cost, and the lines that load it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from timm.models import get_pretrained_cfg

from peft_edge.records import Record, StepProfile


def shareable(record: Record) -> Record:
    """Returns a copy of a record in which local paths are cut down to their last part."""
    return Record.from_json(json.dumps(_cut(json.loads(record.to_json()))))


def _cut(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {_cut(name): _cut(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_cut(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and _is_local(value, key) else value


def _is_local(text: str, key: str) -> bool:
    # "owner/name" may be a data set of the Hub, or a folder here.
    return key in ("output_dir", "cache_dir") or bool(re.match(r"[/~.\\]|[A-Za-z]:[/\\]", text)) or _exists(text)


def _exists(text: str) -> bool:
    return "/" in text and len(text) < 1000 and Path(text).exists()


CARD_NAME = "README.md"
PICTURE_NAME = "cost.png"

_TAGS = ("image-classification", "peft-edge", "timm")
_TYPE_TAGS: dict[str | None, list[str]] = {
    None: [],
    "CONV_LORA": ["CONV_LORA", "lora", "peft"],
    "CONV_ADAPTER": ["CONV_ADAPTER", "adapter", "peft"],
    "LORA": ["lora", "peft"],
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about."""

    base: str
    """What PEFT calls the backbone: an id on the Hub, the name of a timm model, or a local folder."""

    architecture: str
    """The timm model."""

    peft_type: str | None
    """PEFT's type of the adapter; None for a whole model."""

    place: str = "path/or/hub-id/of/this/adapter"
    """Where the reader loads it from."""

    license: str | None = None
    """The Hub's identifier of a license."""

    @classmethod
    def of(cls, model: PeftModel) -> Subject:
        """Describes the active adapter of a model."""
        config, base = model.peft_config[model.active_adapter], model.get_base_model()
        name = config.base_model_name_or_path or getattr(base, "name_or_path", None) or "unknown"
        architecture = getattr(base, "pretrained_cfg", {}).get("architecture", type(base).__name__)
        return cls(base=name, architecture=architecture, peft_type=config.peft_type.value)

    def at(self, place: str, license: str | None) -> Subject:
        """The same, where it can be had and under which license."""
        return replace(self, place=place, license=license)


def adapter_card(subject: Subject, record: Record | None = None, folder: Path | None = None) -> ModelCard:
    """Writes the card of an adapter, or of a whole model.

    Args:
        subject: What it is about.
        record: The run that made it, free of local paths; without one the card has no figures.
        folder: Where the card will lie; with a record that has a profile, the picture of the cost is put there.
    """
    shown = subject.base if subject.base.startswith("timm/") else subject.architecture
    kind = "Model adapted from" if subject.peft_type is None else f"{subject.peft_type} adapter for"
    parts = [f"# {kind} `{shown}`", _how_to_load(subject)]
    if record is not None:
        parts += [_what_was_adapted(record), _accuracy(record), _cost(record, folder)]
    return ModelCard(f"---\n{_metadata(subject, record).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def _metadata(subject: Subject, record: Record | None) -> ModelCardData:
    run = record.run_info.train_config if record is not None else {}
    is_pretrained = run.get("backbone", {}).get("pretrained", False)
    origin = get_pretrained_cfg(run["model_id"].removeprefix("timm/")) if is_pretrained else None
    data = str(run["data"]["name"]) if run else ""
    return ModelCardData(
        library_name="peft" if subject.peft_type is not None else "timm",
        license=subject.license or getattr(origin, "license", None),
        # The Hub only takes its own ids there, not paths.
        base_model=subject.base if subject.base.startswith("timm/") else getattr(origin, "hf_hub_id", None),
        pipeline_tag="image-classification",
        tags=sorted({*_TAGS, *_TYPE_TAGS.get(subject.peft_type, ["peft"]), run.get("method", "peft-edge")}),
        datasets=[data] if "/" in data else None,
        model_name=f"{run['method']} of {subject.architecture}" if run else None,
        eval_results=_results(record) if record is not None else None,
    )


def _results(record: Record) -> list[EvalResult]:
    data, found = record.run_info.train_config["data"], record.train_info.metrics[-1]
    domains = {"test accuracy": f"{data['name']}, {_shift(data)}", "source test accuracy": f"{data['name']}, source"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(data["name"]),
            dataset_name=name,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=key,
            metric_value=found[key],
        )
        for key, name in domains.items()
        if found.get(key) is not None
    ]


def _shift(data: dict[str, Any]) -> str:
    if data["new_classes"]:
        return f"new classes {', '.join(map(str, data['new_classes']))}"
    return str(data["shift"]) + (f" (severity {data['severity']})" if data["severity"] is not None else "")


def _how_to_load(subject: Subject) -> str:
    if subject.peft_type is None:
        return _block(
            "python", f'import peft_edge\nmodel = peft_edge.load_backbone("{subject.place}", pretrained=True)'
        )
    own = f", which makes `{subject.peft_type}` known to PEFT" if subject.peft_type.startswith("CONV_") else ""
    return (
        "Made with [PEFT](https://github.com/huggingface/peft) and peft-edge. The backbone and this adapter in one "
        "call:\n\n"
        + _block("python", f'import peft_edge\nmodel = peft_edge.load_pretrained("{subject.place}")')
        + f"\n\nWith a backbone of your own, and PEFT, after the line `import peft_edge`{own}:\n\n"
        + _block(
            "python",
            "import peft_edge\nfrom peft import PeftModel\n"
            f'model = PeftModel.from_pretrained(backbone, "{subject.place}")',
        )
    )


def _what_was_adapted(record: Record) -> str:
    config = record.run_info.train_config
    weights = "timm's pretrained weights" if config["backbone"].get("pretrained") else "weights of its own"
    return (
        "## What was adapted\n\n"
        f"timm's `{config['model_id']}` with {weights}, for images of {config['data']['image_size']} pixels, was "
        f"adapted from `{config['data']['name']}` to {_shift(config['data'])} with the method `{config['method']}` "
        f"(norm: `{config['norm']}`). `record.json` holds the whole configuration."
    )


def _accuracy(record: Record) -> str:
    # Not with the package, whose import is to be quick.
    from peft_edge.profiling.tables import text_table

    found = record.train_info.metrics[-1]
    rows = [("test accuracy on", "before", "after")] + [
        (name, _share(found.get(f"{key} without update")), _share(found.get(key)))
        for name, key in (("target", "test accuracy"), ("source", "source test accuracy"))
    ]
    return f"## Accuracy\n\n{_block('text', text_table(rows))}"


def _cost(record: Record, folder: Path | None) -> str:
    from peft_edge.profiling.tables import profile_table, text_table

    train = record.train_info
    rows = [
        ("trained parameters", f"{train.num_trainable_params or 0:,}"),
        ("parameters of the model", f"{train.num_total_params or 0:,}"),
        ("saved bytes", f"{train.file_size or 0:,}"),
        ("training seconds", f"{train.train_time or 0:.1f}"),
    ]
    table = text_table(rows) + (f"\n\n{profile_table(record.profile)}" if record.profile else "")
    steps = {f"process {row.process_index}": row for row in record.profile if row.scope == "step"}
    picture = folder is not None and bool(steps) and _draw(steps, folder / PICTURE_NAME)
    return f"## Cost\n\n{_block('text', table)}" + (
        f"\n\n![Memory and arithmetic of a training step]({PICTURE_NAME})" if picture else ""
    )


def _draw(steps: dict[str, StepProfile], path: Path) -> bool:
    """Whether it could: matplotlib is an extra."""
    from peft_edge.profiling.figures import save_cost_figure

    try:
        save_cost_figure(steps, path, title="a training step")
    except ImportError:
        return False
    return True


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
