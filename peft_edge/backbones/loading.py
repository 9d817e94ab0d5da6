"""Load timm's edge CNNs with random, pretrained or local weights, and save them in timm's folder format.

PEFT saves ``model.name_or_path`` with every adapter, as ``base_model_name_or_path``. timm does not set this attribute.
:func:`load_backbone` sets ``name_or_path`` to the Hub id, folder or file of the weights. For random weights, the value
is the timm model name, from which the same weights cannot be loaded again.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn

from peft_edge.backbones.heads import TimmModel, as_timm_model, class_names, head_layers, replace_head
from peft_edge.backbones.weights import WEIGHTS_SUFFIXES, import_weights

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")

EDGE_FAMILIES = {
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_035",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv4": "mobilenetv4_conv_small_035",
    "efficientnet_lite": "efficientnet_lite0",
    "mnasnet": "mnasnet_small",
    "fbnet": "fbnetc_100",
    "ghostnet": "ghostnet_050",
    "tinynet": "tinynet_e",
    # timm has no MCUNet. This model has a similar size and similar blocks: inverted residuals with mixed kernel sizes
    # and expansion ratios, without squeeze-excite.
    "mcunet": "mnasnet_050",
    "resnet": "resnet10t",
    "repvgg": "repvgg_a0",
}
"""For each supported family of edge networks, the name of a small timm model. The tests use these models."""

# timm's default `bn_eps` of this model depends on `pretrained`, and timm does not save `bn_eps`. With a fixed value, a
# model has the same outputs after it is saved and reloaded.
_FIXED_ARGUMENTS: dict[str, dict[str, object]] = {"fbnetc_100": {"bn_eps": 1e-3}}


def load_backbone(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    small_images: bool = False,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Create a timm CNN in train mode.

    The attribute ``name_or_path`` of the model, which PEFT saves with every adapter, is set to the Hub id, folder or
    file of the weights. For random weights, it is set to the timm model name.

    The weights are random unless `name` is a folder, `pretrained` is True, or `checkpoint` is given. If a folder has
    the same name as a timm model, pass the folder as `checkpoint`. From folders and from the Hub, only safetensors
    files are read.

    Args:
        name: A timm model name (``"mobilenetv2_100"``, or ``"mobilenetv2_100.ra_in1k"`` with a tag), the id of a timm
            model on the Hub (``"timm/mobilenetv2_100.ra_in1k"``), or a folder written by :func:`save_backbone`.
        num_classes: The number of classes. If a loaded head has another number of classes, :func:`replace_head`
            replaces it. None keeps the loaded head. With random weights, None means timm's default number of classes.
            If the file `checkpoint` contains no head, this argument is required.
        pretrained: Load the weights from the Hub or its local cache. Must be True if `name` is a Hub id that does not
            start with ``timm/``.
        checkpoint: Load the weights from a folder written by :func:`save_backbone`, or from a file that another program
            wrote (``.safetensors``, ``.pth``, ...; see :func:`import_weights`). If `checkpoint` is given, `name` must
            be a timm model name, with or without ``timm/``.
        small_images: Set the stride of the first convolution from 2 to 1. This doubles the resolution inside the
            network. Use it for images of about 32 to 64 pixels. :func:`save_backbone` saves this setting.
        mean: The mean of the preprocessing (see :func:`set_preprocessing`). For this argument and the next three, None
            keeps the value in ``model.pretrained_cfg``.
        std: The standard deviation of the preprocessing, or None.
        interpolation: The filter for resizing images, or None.
        crop_pct: The fraction of a resized image's side that the centre crop keeps, or None.
        **timm_kwargs: Arguments of :func:`timm.create_model` (``drop_rate``, ``in_chans``, ...).

    Raises:
        ValueError: If an argument is invalid, if the model is not a CNN, or if the checkpoint is damaged or belongs to
            another model. With `small_images=True`: if the stride of the first convolution is neither 1 nor 2, or
            if the model requires a fixed image size.
        FileNotFoundError: If `checkpoint` does not exist, or is a file whose suffix is not in `WEIGHTS_SUFFIXES`. If a
            folder or Hub repository has no ``config.json`` or no ``model.safetensors``.
        OSError: If the pretrained weights are not in the local cache and cannot be downloaded.

    Example:
        >>> model = load_backbone("mobilenetv2_035", num_classes=10)
        >>> model(torch.randn(2, 3, 32, 32)).shape, model.name_or_path
        (torch.Size([2, 10]), 'mobilenetv2_035')
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}.")
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained=True and checkpoint={str(checkpoint)!r} exclude each other: pass one of them.")

    if checkpoint is not None and Path(checkpoint).suffix in WEIGHTS_SUFFIXES and not Path(checkpoint).is_dir():
        model = _from_file(Path(checkpoint), _registry_name(name), num_classes, timm_kwargs)
    elif checkpoint is not None:
        model = _from_checkpoint(Path(checkpoint), _registry_name(name), timm_kwargs)
    elif Path(name).is_dir() and not timm.is_model(name):
        model = _from_checkpoint(Path(name), None, timm_kwargs)
    elif pretrained:
        model = _from_hub(name, timm_kwargs)
    else:
        model = _create(_registry_name(name), timm_kwargs)
        model.name_or_path = _registry_name(name)
        replace_head(model, num_classes or model.num_classes)

    if num_classes is not None and num_classes != model.num_classes:
        replace_head(model, num_classes)
    if small_images:
        _unstride_stem(model)
    set_preprocessing(model, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
    return model


def set_preprocessing(
    model: nn.Module,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> None:
    """Set the preprocessing of a timm model. Arguments that are None change nothing.

    :func:`save_backbone` saves the preprocessing with the model.

    Args:
        model: A timm model.
        mean: The mean that is subtracted from pixels between 0 and 1: three numbers, or one for all channels.
        std: The standard deviation by which pixels are then divided: three numbers, or one for all channels.
        interpolation: The filter for resizing: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_pct: The fraction of a resized image's side that the centre crop keeps.
        crop_mode: How timm fits an image to an input with another aspect ratio. `center` crops the centre, `squash`
            changes the aspect ratio of the image, and `border` adds a border.
        image_size: The side of a square input in pixels, or a pair (height, width). A training run ignores this value,
            and uses `data.image_size` of its configuration.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If an argument is out of range.

    Example:
        >>> model = load_backbone("mobilenetv2_035")
        >>> set_preprocessing(model, mean=0.5, std=0.5)
        >>> model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    changes: dict[str, object] = {}
    for key, value, lowest in (("mean", mean, 0.0), ("std", std, 1e-6)):
        if value is not None:
            values = (value,) * 3 if isinstance(value, int | float) else tuple(value)
            if len(values) != 3 or not all(lowest <= number <= 1 for number in values):
                raise ValueError(
                    f"{key}: expected one or three numbers between 0 and 1, for pixels between 0 and 1, found {value}. "
                    "Divide numbers for pixels up to 255 by 255."
                )
            changes[key] = values
    if interpolation is not None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found {interpolation!r}.")
        changes["interpolation"] = interpolation
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct: expected a number above 0 and up to 1, found {crop_pct}.")
        changes["crop_pct"] = crop_pct
    if crop_mode is not None:
        if crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode: expected one of {', '.join(CROP_MODES)}, found {crop_mode!r}.")
        changes["crop_mode"] = crop_mode
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 1:
            raise ValueError(f"image_size: expected at least 1, found {image_size}.")
        changes["input_size"] = (3, height, width)
    as_timm_model(model).pretrained_cfg.update(changes)


def _create(model_name: str, timm_kwargs: dict[str, object], **loading: object) -> TimmModel:
    arguments = _FIXED_ARGUMENTS.get(model_name.split(".")[0], {}) | timm_kwargs
    model: TimmModel = timm.create_model(model_name, **arguments, **loading)
    if not any(isinstance(module, nn.Conv2d) and key not in stem_names(model) for key, module in model.named_modules()):
        raise ValueError(
            f"{model.pretrained_cfg['architecture']} has no convolution beyond its patch embedding, and peft_edge "
            f"adapts only convolutions. Choose a CNN, such as {', '.join(EDGE_FAMILIES.values())}."
        )
    return model


def _registry_name(name: str) -> str:
    registry_name = name.removeprefix("timm/")
    if timm.is_model(registry_name):
        return registry_name
    nearest = difflib.get_close_matches(registry_name, timm.list_models(), n=3, cutoff=0.5)
    hint = f" The nearest are {', '.join(nearest)}." if nearest else ""
    raise ValueError(
        f"{name!r} is neither a timm model nor an existing folder.{hint} timm.list_models() lists all models; "
        "the id of any other Hub repository requires pretrained=True."
    )


def _from_hub(name: str, timm_kwargs: dict[str, object]) -> TimmModel:
    if "/" in name and not name.startswith("timm/"):
        _download(name, CONFIG_NAME)
        model = _from_checkpoint(_download(name, WEIGHTS_NAME).parent, None, timm_kwargs)
        model.name_or_path = name
        return model

    registry_name = _registry_name(name)
    architecture = registry_name.split(".")[0]
    tagged = timm.list_pretrained(f"{architecture}.*")
    if not tagged or (registry_name != architecture and registry_name not in tagged):
        raise ValueError(
            f"timm has no pretrained weights called {registry_name!r}; for this model, timm has: "
            f"{', '.join(tagged) or 'none'}. timm.list_pretrained() lists all pretrained weights."
        )
    hub_id = get_pretrained_cfg(registry_name).hf_hub_id
    # Pass the safetensors file. With only the Hub id, timm would unpickle the weights of a repository that has no
    # safetensors file.
    weights = {"file": str(_download(hub_id, WEIGHTS_NAME))}
    model = _create(registry_name, timm_kwargs, pretrained=True, pretrained_cfg_overlay=weights)
    model.name_or_path = hub_id
    return model


def _download(repo_id: str, file_name: str) -> Path:
    try:
        return Path(hf_hub_download(repo_id, file_name))
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither a timm model, nor an existing folder, nor a Hub id.") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub repository {repo_id!r} has no {file_name}. Pickled weights (.bin, .pth) are not read from the "
            "Hub: download them, and pass the file as checkpoint."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise OSError(
            f"{file_name} of {repo_id!r} is not in the local cache and could not be fetched from the Hub: {error}\n"
            "Without network, pass checkpoint=<folder written by save_backbone, or file with weights>, or "
            "pretrained=False for random weights (backbone.checkpoint and backbone.pretrained in a configuration)."
        ) from error


def _from_file(path: Path, name: str, num_classes: int | None, timm_kwargs: dict[str, object]) -> TimmModel:
    model = _create(name, timm_kwargs)
    match = import_weights(model, path)
    if match.num_classes is None:
        if num_classes is None:
            raise ValueError(f"{path} has no head: pass num_classes, the number of classes of a new head.")
        replace_head(model, num_classes)
    if not match.is_by_name:
        _warn_once(str(match))
    model.name_or_path = str(path.absolute())
    return model


@functools.cache
def _warn_once(message: str) -> None:
    # A training run loads its backbone several times, but should log each message only once.
    logger.warning(message)


def _from_checkpoint(path: Path, name: str | None, timm_kwargs: dict[str, object]) -> TimmModel:
    # `path` must be a folder, and its `config.json` contains the architecture. If `name` is not None, it must be a name
    # of the same architecture.
    path = path.absolute()
    if path.is_dir():
        config = _read_config(path / CONFIG_NAME)
        saved = config["architecture"]
        if name is not None and name.split(".")[0] != saved:
            raise ValueError(
                f"{path}: expected weights of {name!r}, found those of {saved!r}. "
                f"Pass the name {saved!r}, or another checkpoint."
            )
        arguments = _FIXED_ARGUMENTS.get(saved, {}) | config.get("model_args", {}) | timm_kwargs
        model = _create(f"local-dir:{path}", arguments)
        _load_weights(model, path / WEIGHTS_NAME)
        try:
            class_names(model)
        except ValueError as error:
            raise ValueError(f"{path / CONFIG_NAME}: label_names do not fit the weights. {error}") from error
        if config.get("small_images"):
            _unstride_stem(model)
    else:
        found = "a file of another kind" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"{path}: expected a folder written by save_backbone, or a file that ends in "
            f"{', '.join(WEIGHTS_SUFFIXES)}, found {found}."
        )
    model.name_or_path = str(path)
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config["architecture"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: expected a folder written by save_backbone.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected timm's model configuration, found something else ({error!r}).") from error
    if not timm.is_model(architecture):
        raise ValueError(f"{path}: expected the name of a timm model as architecture, found {architecture!r}.")
    return config


def _load_weights(model: TimmModel, path: Path) -> None:
    """Load a safetensors file into `model`. The file must have the same names and shapes as the model's state dict.

    Only the number of classes may differ. In this case, `model` first gets a new head with the number of classes in
    the file.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the checkpoint has no weights in safetensors format.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found a damaged or truncated file of {path.stat().st_size} "
            f"bytes ({error}). Copy or save the file again."
        ) from error

    for name, layer in head_layers(model):
        saved = weights.get(f"{name}.weight", layer.weight)
        if len(saved) != len(layer.weight):
            model.reset_classifier(len(saved))
            break
    states = model.state_dict(), weights
    expected, found = ({name: str(tuple(tensor.shape)) for name, tensor in state.items()} for state in states)
    problems = [
        f"{name}: expected {expected.get(name, 'no such tensor')}, found {found.get(name, 'no such tensor')}"
        for name in expected | found
        if expected.get(name) != found.get(name)
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit {model.pretrained_cfg['architecture']}, in {len(problems)} tensors. The first are: "
            f"{'; '.join(problems[:3])}. Pass the name and the arguments of the model that was saved."
        )
    model.load_state_dict(weights)


def stem_names(model: TimmModel) -> tuple[str, ...]:
    """Return the names of the convolutions whose input is the image. RepVGG, for example, has two parallel ones."""
    names = model.pretrained_cfg["first_conv"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def _unstride_stem(model: TimmModel) -> None:
    convs = [model.get_submodule(name) for name in stem_names(model)]
    strides = {getattr(conv, "stride", None) for conv in convs}
    has_fixed_size = model.pretrained_cfg["fixed_input_size"]
    if not strides or not strides <= {(1, 1), (2, 2)} or has_fixed_size:
        raise ValueError(
            f"{model.pretrained_cfg['architecture']} does not support small_images: expected a stem with stride 2 and "
            f"any image size, found strides {strides} and fixed_input_size={has_fixed_size}. Leave out small_images."
        )
    for conv in convs:
        setattr(conv, "stride", (1, 1))  # noqa: B010  # nn.Module declares no stride
    model.small_images = True


def save_backbone(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a timm model in timm's folder format, as ``config.json`` and ``model.safetensors``.

    If the model has class names, they are saved in ``config.json``. Both ``load_backbone(folder)`` and
    ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` load the model, but only ``load_backbone`` restores
    the setting `small_images` (stride 1 instead of 2 in the first convolution). Existing files in `folder` are replaced
    only after the two new files are complete.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If the number of class names is not the number of classes.
        OSError: If a file cannot be written.

    Example:
        >>> model = load_backbone("mobilenetv2_035", num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(model, folder)
        ...     fingerprint(load_backbone(folder)) == fingerprint(model)
        True
    """
    as_timm_model(model)
    extra: dict[str, object] = {"small_images": True} if getattr(model, "small_images", False) else {}
    if names := class_names(model):
        extra["label_names"] = names
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors rejects tensors that are not contiguous, such as those of a model in channels_last.
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        try:
            save_for_hf(contiguous, unfinished, model_config=extra, safe_serialization=True)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{folder}: the backbone could not be written ({error}). The folder's content is unchanged. Free some "
                "space, or choose another folder."
            ) from error
        for file_name in (WEIGHTS_NAME, CONFIG_NAME):
            (Path(unfinished) / file_name).replace(folder / file_name)


def fingerprint(model: nn.Module) -> str:
    """Return a hexadecimal SHA-256 hash of the names, shapes, dtypes and values of all tensors in the state dict.

    The hash does not depend on device and memory format, so a model has the same hash after it is saved and reloaded.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> fingerprint(copy.deepcopy(layer)) == fingerprint(layer), fingerprint(nn.Linear(2, 2)) == fingerprint(layer)
        (True, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
