"""Writes an adapter to a folder, with the names of its classes and a card."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import CONFIG_NAME

from peft_edge.backbones import class_names
from peft_edge.files import written_whole
from peft_edge.hub.card import CARD_NAME, Subject, adapter_card
from peft_edge.hub.patterns import exact_pattern, is_linear
from peft_edge.tuners.targets import sites

LABELS_NAME = "label_names.json"

SOURCE_NAME = "source_model"
"""The subfolder with the backbone, where that cannot be had elsewhere."""

BACKBONE_FILES = ("config.json", "model.safetensors")


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter, the names of its classes, and a card with the lines that load it; replaces what is there.

    Args:
        model: The adapted model; its active adapter is saved.
        folder: Where to. It appears whole or not at all.

    Raises:
        ValueError: There are not as many class names as classes.
        OSError: The folder cannot be written.
    """
    with written_whole(Path(folder)) as unfinished:
        write_adapter(model, unfinished, adapter_card(Subject.of(model)))


def write_adapter(model: PeftModel, folder: Path, card: ModelCard) -> None:
    """Writes what `save_adapter` does, with a card of the caller's, to which PEFT adds its version."""
    names = class_names(model)
    folder.mkdir(exist_ok=True)
    card.save(folder / CARD_NAME)
    # Without the argument, PEFT asks the Hub how large the base model's vocabulary is.
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter], save_embedding_layers=False)
    # PEFT puts an adapter that is not called "default" into a folder of its name.
    for file in list(folder.glob(f"{model.active_adapter}/*")):
        file.rename(folder / file.name)
    (folder / CARD_NAME).write_text(_with_own_tags(card, folder), encoding="utf-8")
    if names is not None:
        (folder / LABELS_NAME).write_text(json.dumps(names), encoding="utf-8")
    _make_loadable(model, folder / CONFIG_NAME)


def _with_own_tags(card: ModelCard, folder: Path) -> str:
    """PEFT replaces the tags by its own, one of which is the path of the backbone on this machine."""
    extended: Any = ModelCard.load(folder / CARD_NAME)
    extended.data.tags = card.data.to_dict()["tags"]
    return str(extended)


def _make_loadable(model: PeftModel, path: Path) -> None:
    """Names the modules that a pattern matches which `load_pretrained` refuses, since it trusts no file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    names = [site.name for site in sites(model.get_base_model())]
    for field in ("target_modules", "exclude_modules"):
        pattern = config.get(field)
        if isinstance(pattern, str) and not is_linear(pattern):
            config[field] = exact_pattern(name for name in names if re.fullmatch(pattern, name))
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
