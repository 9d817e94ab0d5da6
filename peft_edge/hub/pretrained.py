"""Loads an adapter with its backbone: everything is checked on a copy without storage before anything is made."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peft_edge.backbones import grow_head, head_names, load_backbone, replace_head, set_class_names
from peft_edge.hub.adapter_files import (
    BACKBONE_FILES,
    LABELS_NAME,
    SOURCE_NAME,
    Layout,
    check_finite,
    read_configuration,
    read_json,
    read_layout,
    resolve_patterns,
)

# Others name files to read, or say how many layers to make.
_MODEL_ARGS = {"act_layer", "bn_eps", "bn_momentum", "global_pool", "img_size", "in_chans", "num_classes", "pad_type"}


def load_pretrained(
    adapter: str | os.PathLike[str], *, base: nn.Module | None = None, revision: str | None = None
) -> PeftModel:
    """Loads an adapter together with the backbone it was trained on.

    The files may come from anybody. Only JSON and safetensors are read, and that the adapter fits is tried on torch's
    meta device, where nothing has storage, before a tensor is made.

    Args:
        adapter: A folder written by `save_adapter` or PEFT's `save_pretrained`, or the id of one on the Hub.
        base: The backbone, where it cannot be loaded by the name in the adapter's configuration. It is left as it is:
            a copy is adapted, whose head is made as large as the adapter's, where the adapter has one.
        revision: A branch, tag or commit on the Hub.

    Returns:
        The adapted model in eval mode: images of shape (B, C, H, W) to logits (B, num_classes), whose names
        `peft_edge.backbones.class_names` gives.

    Raises:
        FileNotFoundError: There is no such folder or repository, a file in it is missing, or the backbone's is.
        ValueError: A file is damaged or hostile, or the adapter was made for another backbone; the message names the
            file, the key or the first tensor that does not fit.
    """
    folder = _folder_of(adapter, revision)
    config = read_configuration(folder / CONFIG_NAME)
    if base is None:
        _check_library(folder, config)
    layout = _read_adapter_layout(folder / SAFETENSORS_WEIGHTS_NAME)
    base_name = config.base_model_name_or_path
    is_own = Path(adapter).is_dir()
    model = _load_base(base_name, folder, is_own=is_own) if base is None else copy.deepcopy(base)
    try:
        resolve_patterns(config, [name for name, _ in model.named_modules()])
        _check_fit(model, config, layout)
    except Exception as error:  # whatever PEFT and timm make of numbers and names that make no sense together
        raise _misfit(folder, base_name, error) from error
    check_finite(folder / SAFETENSORS_WEIGHTS_NAME)
    _fit_head(model, layout)
    _name_classes(model, folder / LABELS_NAME)
    try:
        return PeftModel.from_pretrained(model, folder, config=config).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _misfit(folder, base_name, error) from error


def _folder_of(adapter: str | os.PathLike[str], revision: str | None) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    source = [f"{SOURCE_NAME}/{name}" for name in BACKBONE_FILES]
    return _downloaded(
        str(adapter),
        [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, LABELS_NAME, *source],
        "the folder of an adapter",
        revision=revision,
    )


def _downloaded(repo_id: str, files: list[str], expected: str, *, revision: str | None = None) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repo_id}: expected {expected}, or the id of one on the Hub. No such folder exists, and from the Hub: "
            f"{reason}"
        ) from error


def _check_library(folder: Path, config: PeftConfig) -> None:
    mapping = config.auto_mapping or {}
    if str(mapping.get("parent_library")).startswith("transformers."):
        raise ValueError(
            f"{folder}: expected the adapter of a timm model, found that of a {mapping.get('base_model_class')!r:.80} "
            "of transformers: load it with peft.AutoPeftModel.from_pretrained, or pass such a model as base="
        )


def _read_adapter_layout(path: Path) -> Layout:
    try:
        return read_layout(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing. Pickled adapters (adapter_model.bin) are not read: save it again as safetensors"
        ) from error


def _load_base(name: str | None, folder: Path, *, is_own: bool) -> nn.Module:
    if (folder / SOURCE_NAME).is_dir():
        return _load_checked(folder / SOURCE_NAME)
    if not name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model: pass the backbone as base=")
    # What comes from the Hub cannot know a path on this machine.
    if is_own and Path(name).is_dir():
        return load_backbone(name)
    if is_own and Path(name).is_absolute():
        raise FileNotFoundError(
            f"{name}, the backbone of {folder}, is not there: put it back, or pass the backbone as base="
        )
    if not timm.is_model(name.removeprefix("timm/")):
        return _load_checked(_downloaded(name, list(BACKBONE_FILES), f"the backbone of {folder}"), name)
    base = load_backbone(name, pretrained="/" in name)
    if "/" not in name:
        warnings.warn(f"{folder} was trained on a {name} with random weights, and gets other ones", stacklevel=3)
    return base


def _load_checked(folder: Path, name: str | None = None) -> nn.Module:
    """Loads a backbone that is tried without storage before, so that no file says how much memory that takes."""
    config, weights = (folder / file for file in BACKBONE_FILES)
    try:
        if unknown := read_json(config).get("model_args", {}).keys() - _MODEL_ARGS:
            raise ValueError(
                f"model_args: {min(unknown)[:80]!r} is not taken from elsewhere: build the backbone with it, and pass "
                "it as base="
            )
        read_layout(weights)
        with torch.device("meta"), warnings.catch_warnings():
            # Nothing can be copied to the meta device, says torch.
            warnings.simplefilter("ignore", UserWarning)
            load_backbone(str(folder))
    except OSError:
        raise
    except Exception as error:  # whatever timm makes of a configuration that makes no sense
        raise ValueError(f"{folder}: expected a backbone: {type(error).__name__}: {error!s:.500}") from error
    check_finite(weights)
    model: Any = load_backbone(str(folder))
    if name is not None:
        model.name_or_path = name
    return model


def _check_fit(model: nn.Module, config: PeftConfig, layout: Layout) -> None:
    """Adapts a copy of the model without storage, and compares its adapter with the one in the file."""
    trial, config = copy.deepcopy(model).to("meta"), copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # a decomposition needs values
    with torch.device("meta"):
        _fit_head(trial, layout)
        # Without the argument, PEFT asks the Hub how large the base model's vocabulary is.
        state = get_peft_model_state_dict(PeftModel(trial, config), save_embedding_layers=False)
    if differing := sorted(state.keys() ^ layout.keys()):
        name = differing[0]
        problem = "is not in the adapter" if name in state else "has no place in this backbone"
        raise ValueError(f"{name} {problem}, and so for {len(differing)} tensors in all")
    for name, tensor in state.items():
        shape, dtype = layout[name]
        if shape != tuple(tensor.shape) or dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(
                f"size mismatch for {name}: expected {tuple(tensor.shape)} of {tensor.dtype}, found {shape} of {dtype}"
            )


def _fit_head(base: Any, layout: Layout) -> None:
    """Gives the backbone a head as large as the adapter's; one that grows keeps its rows."""
    for head in head_names(base) if hasattr(base, "get_classifier") else ():
        shape, _ = layout.get(f"base_model.model.{head}.weight", ((), None))
        classes = shape[0] if shape else base.num_classes
        if classes > base.num_classes:
            grow_head(base, classes)
        elif classes < base.num_classes:
            replace_head(base, classes)


def _name_classes(base: nn.Module, path: Path) -> None:
    if not path.exists():
        return
    try:
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of texts, found {type(names).__name__}")
        set_class_names(base, names)
    except ValueError as error:
        raise ValueError(
            f"{path} does not name the classes of the adapter: {error} Copy it again, or delete it"
        ) from error


def _misfit(folder: Path, base_name: str | None, error: Exception) -> ValueError:
    problem = " ".join(f"{error!s:.500}".split())
    return ValueError(
        f"{folder}: the adapter does not fit this backbone: {type(error).__name__}: {problem}. It was made for "
        f"{base_name!s:.200}: load that one, or pass another as base="
    )
