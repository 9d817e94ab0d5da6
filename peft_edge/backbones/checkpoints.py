"""A backbone on disk: timm's folder format, with the weights in safetensors only."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from peft_edge.backbones.heads import as_timm_model, class_names, head_layers

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def save_backbone(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a timm model in timm's own folder format: ``config.json`` (with the class names), ``model.safetensors``.

    ``load_backbone(folder)`` and ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` read it; only the former
    knows of ``small_images``. Files of those names already there are replaced once both new ones are whole.

    Raises:
        TypeError: The model was not made by timm.
        ValueError: There are not as many class names as classes.
        OSError: The folder cannot be written.
    """
    as_timm_model(model)
    extra: dict[str, Any] = {"small_images": True} if getattr(model, "small_images", False) else {}
    if names := class_names(model):
        extra["label_names"] = names
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses strided tensors, which is what channels_last training leaves.
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        try:
            save_for_hf(contiguous, unfinished, model_config=extra, safe_serialization=True)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{folder}: the backbone could not be written ({error}). What was there before is unchanged: free some "
                "space, or choose another folder."
            ) from error
        for file_name in (WEIGHTS_NAME, CONFIG_NAME):
            (Path(unfinished) / file_name).replace(folder / file_name)


def read_config(path: Path) -> dict[str, Any]:
    """Returns timm's model configuration, whose ``architecture`` is sure to be a timm model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else, or names a model that timm does not know.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config["architecture"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {path.parent} is no folder written by save_backbone.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected timm's model configuration, found something else ({error!r}).") from error
    if not timm.is_model(architecture):
        raise ValueError(f"{path}: expected the name of a timm model as architecture, found {architecture!r}.")
    return config


def load_weights(model: Any, path: Path) -> None:
    """Loads every tensor of the model from a safetensors file, with as many classes as that file has.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or its tensors are not those of the model.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the checkpoint has no weights in safetensors format.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found a damaged or truncated one of {path.stat().st_size} "
            f"bytes ({error}). Copy or save it again."
        ) from error

    for name, layer in head_layers(model):
        saved = weights.get(f"{name}.weight", layer.weight)
        if len(saved) != len(layer.weight):
            model.reset_classifier(len(saved))
            break

    expected = model.state_dict()
    problems = [
        f"{name}: expected shape {tuple(tensor.shape)}, found "
        + (str(tuple(weights[name].shape)) if name in weights else "no such tensor")
        for name, tensor in expected.items()
        if name not in weights or weights[name].shape != tensor.shape
    ] + [f"{name}: expected no such tensor" for name in weights if name not in expected]
    if problems:
        raise ValueError(
            f"{path} does not fit {model.pretrained_cfg['architecture']}, in {len(problems)} tensors. The first are: "
            f"{'; '.join(problems[:3])}. Pass the model name and arguments that the file was made with."
        )
    model.load_state_dict(weights)


def fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256 of the state dict: names, shapes, dtypes and bytes, in the order of the names.

    Device and memory format do not enter, so a model and its reloaded copy have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
