"""Updates on the disk: an adapter, or the whole model where the method trains the model's own weights."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from peft_edge.backbones import grow_head, load_backbone, save_backbone
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.methods import Method, Options, memory_format


def save_update(model: Any, folder: Path, *, ships_model: bool) -> None:
    """Writes the update to `folder/adapter`, or the merged model to `folder/model`.

    Args:
        model: From `Method.prepare`, and trained; it is not to be used any more.
        folder: Where to.
        ships_model: See `Method`.
    """
    if ships_model:
        save_backbone(model.merge_and_unload() if isinstance(model, PeftModel) else model, folder / "model")
    else:
        save_adapter(model, folder / "adapter")


def load_update(folder: Path, device: torch.device) -> nn.Module:
    """Loads what `save_update` wrote into a fresh model.

    Args:
        folder: That of the adapter or of the model.
        device: Where to.
    """
    model = load_pretrained(folder) if (folder / CONFIG_NAME).exists() else load_backbone(str(folder))
    return model.to(device).to(memory_format=memory_format(model))


def merged_copy(model: nn.Module) -> nn.Module | None:
    """Returns a copy of what `load_update` gave, with its adapter merged; None where that is impossible.

    A non-linear adapter never merges, PEFT's own LoRA not where there are groups.
    """
    if not isinstance(model, PeftModel):
        return model
    with suppress(NotImplementedError):
        return copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return None


def continue_update(folder: Path, source: nn.Module, method: Method, options: Options) -> Any:
    """Prepares a model that starts from a saved update, to be trained on.

    Args:
        folder: That of the adapter or of the model.
        source: The source model that the adapter belongs to; left as it is.
        method: The update's method.
        options: Its options.
    """
    updated: Any = load_update(folder, next(source.parameters()).device)
    if method.ships_model:
        return method.prepare(updated, options)
    base = copy.deepcopy(source)
    grow_head(base, updated.get_base_model().num_classes)
    model: Any = method.prepare(base, options)
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    return model
