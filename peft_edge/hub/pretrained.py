"""Load an adapter with its backbone from files that may be damaged or hostile."""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peft_edge.backbones import grow_head, head_names, load_backbone, replace_head, set_class_names, set_preprocessing
from peft_edge.backbones.heads import as_timm_model
from peft_edge.hub.adapter_files import (
    BACKBONE_FILES,
    BASE_NAME,
    LABELS_NAME,
    PREPROCESSING_NAME,
    SOURCE_NAME,
    Layout,
    check_finite,
    read_configuration,
    read_json,
    read_layout,
    resolve_patterns,
)
from peft_edge.names import nearest_folder
from peft_edge.tuners.injection import base_fingerprint

# The arguments of `timm.create_model` that a downloaded backbone may set. Other arguments could name files on this
# machine, or set an arbitrary number of layers.
_MODEL_ARGS = {"act_layer", "bn_eps", "bn_momentum", "global_pool", "img_size", "in_chans", "num_classes", "pad_type"}

_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_LARGEST_SIDE = 8192  # pixels; a hostile file could otherwise make the preprocessing exhaust the memory


def load_pretrained(
    adapter: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    revision: str | None = None,
    allow_other_base: bool = False,
) -> PeftModel:
    """Load an adapter together with the backbone that it was trained on.

    The files may come from an untrusted source. Only JSON and safetensors files are read. Before the adapter is
    added to the backbone, both are built on torch's meta device, which takes no memory. The tensors of the adapter on
    this device must have the same names and shapes as the tensors in the adapter's file.

    Args:
        adapter: A folder written by `save_adapter` or by PEFT's `save_pretrained`, or the id of an adapter on the Hub.
        base: The backbone. The adapter is added to a copy of `base`. The head of this copy gets as many classes as the
            adapter's head. By default, the backbone is loaded from the adapter's subfolder `source_model`. If there is
            no such subfolder, the backbone that the adapter's configuration names is loaded.
        revision: A branch, tag or commit of the adapter's repository on the Hub.
        allow_other_base: Whether to accept a backbone whose weights differ from those that the adapter was trained on.
            `save_adapter` saves a fingerprint (hash) of the base weights, which reveals the difference. An adapter that
            PEFT's `save_pretrained` saved has no fingerprint, and is always accepted if its tensors fit.

    Returns:
        The adapted model in eval mode. It maps images (B, C, H, W) to logits (B, num_classes). If class names were
        saved with the adapter, `peft_edge.backbones.class_names` returns them. timm's `resolve_model_data_config`
        returns the preprocessing that was saved with the adapter. If none was saved, it returns the backbone's.

    Raises:
        FileNotFoundError: If the folder or repository of the adapter, a required file in it, or the backbone is
            missing.
        ValueError: If a file is damaged or unsafe, or if the adapter was trained on another backbone or with other
            base weights. If `base` is None and the adapter's configuration names no timm backbone. The message names
            the file, the key or the first tensor that does not fit.

    Example:
        >>> import copy, tempfile
        >>> from peft import get_peft_model
        >>> from peft_edge import ConvLoraConfig, load_backbone, load_pretrained
        >>> from peft_edge.hub import save_adapter
        >>> base = load_backbone("mobilenetv2_035", 3)
        >>> model = get_peft_model(copy.deepcopy(base), ConvLoraConfig(target_modules="pointwise"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     loaded = load_pretrained(folder, base=base)
        >>> loaded(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    folder, is_local = Path(adapter), Path(adapter).is_dir()
    if not is_local:
        backbone = [f"{SOURCE_NAME}/{name}" for name in BACKBONE_FILES]
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, LABELS_NAME, PREPROCESSING_NAME, BASE_NAME, *backbone]
        nearest = nearest_folder(folder)
        folder = _download(str(adapter), files, "the folder of an adapter", revision=revision, nearest=nearest)
    config = read_configuration(folder / CONFIG_NAME)
    layout = read_layout(folder / SAFETENSORS_WEIGHTS_NAME)
    check_finite(folder / SAFETENSORS_WEIGHTS_NAME)
    model = _load_base(config, folder, is_local=is_local) if base is None else copy.deepcopy(base)
    try:
        resolve_patterns(config, [name for name, _ in model.named_modules()])
        _check_fit(model, config, layout)
        _resize_head(model, layout)
        adapted = PeftModel.from_pretrained(model, folder, config=config).eval()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PEFT and timm raise many kinds of errors for a configuration that does not fit
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        problem = kind + " ".join(f"{error!s:.500}".split()).rstrip(".")
        raise ValueError(
            f"{folder}: the adapter does not fit this backbone: {problem}. "
            f"It was made for {config.base_model_name_or_path!s:.200}: load that backbone, or pass it as base=. If "
            f"{CONFIG_NAME} was edited, restore it"
        ) from error
    if not allow_other_base:
        _check_base(adapted, folder / BASE_NAME, config.base_model_name_or_path)
    _set_class_names(adapted, folder / LABELS_NAME)
    _set_preprocessing(adapted.get_base_model(), folder / PREPROCESSING_NAME)
    return adapted


def _check_base(adapted: PeftModel, path: Path, name: str | None) -> None:
    """Raise a ValueError if the base weights of `adapted` do not have the fingerprint (hash) in the file `path`.

    If the file is missing, or the fingerprint of `adapted` cannot be computed, there is no error. `name` is the folder
    or repository of the backbone on which the adapter was trained. Only the message uses `name`.
    """
    if not path.exists():
        return
    try:
        expected = read_json(path)
        if isinstance(expected, str):  # earlier versions wrote only the hash of the parameters
            expected = {"parameters": expected}
        if not isinstance(expected, dict) or not {"parameters"} <= expected.keys() <= {"parameters", "statistics"}:
            raise ValueError("expected the hashes of the parameters and, for frozen norms, of the statistics")
        if not all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in expected.values()):
            raise ValueError("it is not a SHA-256 hash")
    except ValueError as error:
        raise ValueError(f"{path}: expected the fingerprint of the base: {error}. Copy the file again") from error
    found = base_fingerprint(adapted) or {}
    names = {"parameters": "weights", "statistics": "BatchNorm statistics"}
    for key in expected.keys() & found.keys():
        if found[key] != expected[key]:
            raise ValueError(
                f"{path.parent}: the adapter was trained on other {names[key]} of this network: expected the "
                f"fingerprint {expected[key][:16]}, found {found[key][:16]}. Pass the backbone on which it was trained "
                f"(base= or --base {name!s:.200}), with the dtype that it had in training, or accept these "
                f"{names[key]} (allow_other_base=True or --allow-other-base)"
            )


def _download(
    repo_id: str, files: list[str], expected: str, *, revision: str | None = None, nearest: Path | None = None
) -> Path:
    """Download the listed `files` from a repository, and return the local folder that contains them.

    Files that the repository does not contain are skipped. If the download fails, raise a FileNotFoundError. Its
    message says that `expected`, such as "the folder of an adapter", was not found at `repo_id`. If `nearest` is
    given, the message suggests this local folder, whose name is similar to `repo_id`.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if nearest is not None:
            problem = f"found no such folder. Did you mean {nearest}?"
        elif isinstance(error, HFValidationError):
            problem = "found no such folder. Pass an existing folder, or an id on the Hub such as owner/name"
        else:
            reason = str(error).strip().splitlines()[0]
            problem = f"or its id on the Hub. There is no such folder, and the Hub answered: {reason}"
        raise FileNotFoundError(f"{repo_id}: expected {expected}, {problem}") from error


def _load_base(config: PeftConfig, folder: Path, *, is_local: bool) -> nn.Module:
    """Load the backbone of the adapter in `folder`.

    The backbone is in the subfolder `source_model` of `folder`, in another local folder, or on the Hub. `is_local` is
    False if `folder` was downloaded from the Hub. If the configuration names only a timm architecture, the adapter was
    trained on random weights that were not saved. In this case, warn, and return a model with other random weights.
    """
    name, mapping = config.base_model_name_or_path, config.auto_mapping or {}
    if str(mapping.get("parent_library")).startswith("transformers."):
        raise ValueError(
            f"{folder}: expected an adapter of a timm model, found an adapter of the transformers model "
            f"{mapping.get('base_model_class')!r:.80}: load it with peft.AutoPeftModel.from_pretrained, or pass such a "
            "model as base="
        )
    if (folder / SOURCE_NAME).is_dir():
        return _load_untrusted(folder / SOURCE_NAME)
    if not name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model: pass the backbone as base=")
    # Only a local adapter may name a path, because a file from the Hub must not determine which local files are read.
    if is_local and Path(name).is_dir():
        return load_backbone(name)
    if is_local and Path(name).is_absolute():
        raise FileNotFoundError(f"{name}, the backbone of {folder}, is missing: restore it, or pass it as base=")
    if not timm.is_model(name.removeprefix("timm/")):
        return _load_untrusted(_download(name, list(BACKBONE_FILES), f"the backbone of {folder}"), name)
    base = load_backbone(name, pretrained="/" in name)
    if "/" not in name:
        warnings.warn(
            f"{folder} was trained on random weights of {name} that are not saved, and other random weights are used: "
            "pass the original backbone as base=",
            stacklevel=3,
        )
    return base


def _load_untrusted(folder: Path, name: str | None = None) -> nn.Module:
    """Load a backbone from a folder with files that may be hostile.

    The backbone is first built on the meta device, which takes no memory. This fails if the tensors in the weights
    file and in the configured network differ in shape. Therefore the configuration cannot request a model with
    more weights than the file contains. If `name` is given, the attribute `name_or_path` of the model is set to `name`.
    """
    config, weights = (folder / file for file in BACKBONE_FILES)
    try:
        found = read_json(config)
        model_args = found.get("model_args") if isinstance(found, dict) else None
        if isinstance(model_args, dict) and (unknown := model_args.keys() - _MODEL_ARGS):
            raise ValueError(
                f"model_args: {min(unknown)[:80]!r} is not accepted from a downloaded file: build the backbone with "
                "it, and pass it as base="
            )
        read_layout(weights)
        with torch.device("meta"), warnings.catch_warnings():
            # torch warns that a copy of values to the meta device has no effect.
            warnings.simplefilter("ignore", UserWarning)
            load_backbone(str(folder))
    except OSError:
        raise
    except Exception as error:  # timm raises many kinds of errors for an invalid configuration
        raise ValueError(f"{folder}: expected a backbone: {type(error).__name__}: {error!s:.500}") from error
    check_finite(weights)
    model = load_backbone(str(folder))
    if name is not None:
        as_timm_model(model).name_or_path = name
    return model


def _check_fit(model: nn.Module, config: PeftConfig, layout: Layout) -> None:
    """Raise a ValueError if the adapter does not fit `model`.

    `layout` contains the names, shapes and dtypes of the tensors in the adapter's file. The check adds an adapter with
    the configuration `config` to a copy of `model` on the meta device. The tensors of this adapter must have the names
    and shapes in `layout`. If a tensor has a floating-point dtype, its dtype in `layout` must also be floating-point,
    and vice versa.
    """
    trial, config = _without_values(model), copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # some initialisations decompose weights, but weights of `trial` have no values
    with torch.device("meta"):
        _resize_head(trial, layout)
        # By default (`save_embedding_layers="auto"`), PEFT would request the base model's vocabulary size from the Hub.
        state = get_peft_model_state_dict(PeftModel(trial, config), save_embedding_layers=False)
    if differing := sorted(state.keys() ^ layout.keys()):
        name = differing[0]
        problem = "is not in the adapter" if name in state else "has no place in this backbone"
        raise ValueError(f"{name} {problem}; {len(differing)} tensors differ in all")
    for name, tensor in state.items():
        shape, dtype = layout[name]
        if shape != tuple(tensor.shape) or dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(
                f"size mismatch for {name}: expected {tuple(tensor.shape)} of {tensor.dtype}, found {shape} of {dtype}"
            )


def _without_values(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device. To save memory, only shapes and dtypes are copied, not values."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return copy.deepcopy(model, memo).to("meta")


def _resize_head(base: nn.Module, layout: Layout) -> None:
    """Give the head of `base` as many classes as the adapter's head has, in place.

    `layout` contains the names and shapes of the adapter's tensors. A head that grows keeps its old rows. A head that
    shrinks gets new random weights. If the adapter has no head, nothing changes.
    """
    for head in head_names(base) if hasattr(base, "get_classifier") else ():
        shape, _ = layout.get(f"base_model.model.{head}.weight", ((), None))
        num_classes = as_timm_model(base).num_classes
        if shape and shape[0] != num_classes:
            (grow_head if shape[0] > num_classes else replace_head)(base, shape[0])


def _set_class_names(base: nn.Module, path: Path) -> None:
    """Set the class names of `base` to those in the file `path`. If the file is missing, nothing changes."""
    if not path.exists():
        return
    try:
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of strings, found {type(names).__name__}")
        set_class_names(base, names)
    except ValueError as error:
        raise ValueError(
            f"{path} does not name the classes of the adapter: {str(error)[:500].rstrip('.')}. Copy the file again, or "
            "delete it"
        ) from error


def _set_preprocessing(base: nn.Module, path: Path) -> None:
    """Set the preprocessing of `base` to that in the file `path`. If the file is missing, nothing changes."""
    if not path.exists() or not hasattr(base, "pretrained_cfg"):
        return
    try:
        found = read_json(path)
        expected = {"input_size", *_PREPROCESSING}
        if not isinstance(found, dict) or found.keys() != expected:
            raise ValueError(f"expected the keys {', '.join(sorted(expected))}.")
        channels, height, width = found["input_size"]
        most = _LARGEST_SIDE * float(found["crop_pct"])  # timm resizes images to side / crop_pct before the crop
        if channels != 3 or not all(type(side) is int and side <= most for side in (height, width)):
            raise ValueError(f"input_size: expected 3 channels, and at most {_LARGEST_SIDE} pixels before the crop.")
        set_preprocessing(base, image_size=(height, width), **{name: found[name] for name in _PREPROCESSING})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not the preprocessing of the adapter: {str(error)[:500].rstrip('.')}. Copy the file again, "
            "or delete it"
        ) from error
