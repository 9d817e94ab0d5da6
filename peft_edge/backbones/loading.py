"""The first convolution of a timm model, and the form of it that keeps the resolution of small images.

A backbone on disk: timm's folder format, with the weights in safetensors only.

Loading timm's edge CNNs with pretrained, local or random weights.

What a backbone is called matters to PEFT: it writes ``model.name_or_path`` into every adapter as
``base_model_name_or_path``. timm leaves that attribute unset, so :func:`load_backbone` sets it, to something that
:func:`load_backbone` accepts again.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import tempfile
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

from peft_edge.backbones.heads import as_timm_model, class_names, head_layers, replace_head


def stem_names(model: Any) -> tuple[str, ...]:
    """The names of the convolutions that see the image; the branches of a RepVGG stem are two."""
    names = model.pretrained_cfg["first_conv"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def unstride_stem(model: Any) -> None:
    """Sets the stem's stride to 1, and marks the model so that `save_backbone` records it.

    Raises:
        ValueError: The stem has another stride (it cuts the image into patches), or the model's input size is fixed.
    """
    convs = [model.get_submodule(name) for name in stem_names(model)]
    strides = {getattr(conv, "stride", None) for conv in convs}
    if not strides or not strides <= {(1, 1), (2, 2)} or model.pretrained_cfg["fixed_input_size"]:
        raise ValueError(
            f"{model.pretrained_cfg['architecture']} has no form for small images: expected a stem of stride 2 and a "
            f"free image size, found strides {strides} and fixed_input_size="
            f"{model.pretrained_cfg['fixed_input_size']}. Leave small_images out, or choose one of EDGE_FAMILIES."
        )
    for conv in convs:
        conv.stride = (1, 1)
    model.small_images = True


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
    # timm has no MCUNet. This one has its building blocks (inverted residuals of mixed kernel size and expansion,
    # no squeeze-excite) and its size.
    "mcunet": "mnasnet_050",
    "resnet": "resnet10t",
    "repvgg": "repvgg_a0",
}
"""The edge families named by the project, each with a small timm model that the tests run."""

# timm builds this model with another epsilon when pretrained=True than when not, and its saved configuration does not
# say which. Given always, it is the same model whoever reads it.
_ARGUMENTS_TO_STATE: dict[str, dict[str, Any]] = {"fbnetc_100": {"bn_eps": 1e-3}}


def load_backbone(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    small_images: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Builds a timm CNN and sets ``model.name_or_path`` to what loads the same weights again.

    Weights are random unless `pretrained` or `checkpoint` says otherwise, and are only ever read from safetensors.

    Args:
        name: A timm model name (``"mobilenetv2_100"``, with a tag ``"mobilenetv2_100.ra_in1k"``), the id of a timm
            model on the Hub (``"timm/mobilenetv2_100.ra_in1k"``), or a folder written by :func:`save_backbone`, which
            is then also the checkpoint.
        num_classes: Outputs of the classifier. None keeps those of the weights (timm's default for random ones). Any
            head whose weights do not come with it is drawn by :func:`replace_head`.
        pretrained: Take the weights from the Hub, or from its local cache.
        checkpoint: Take the weights from a folder written by :func:`save_backbone`, or from a ``.safetensors`` file.
        small_images: Keep twice the resolution, for images of about 32 to 64 pixels: the stem runs at stride 1, not 2.
            The weights stay as they are, and :func:`save_backbone` records it.
        **timm_kwargs: Passed on to :func:`timm.create_model` (``drop_rate``, ``in_chans``, ...).

    Returns:
        The model in train mode, taking images of shape (B, in_chans, H, W) and returning logits (B, num_classes).

    Raises:
        ValueError: The name is unknown, the model is no CNN, its stem cannot run at stride 1, or the checkpoint is
            damaged or belongs to another model.
        FileNotFoundError: The checkpoint, or a file in it, is missing.
        OSError: The pretrained weights can be neither downloaded nor found in the cache.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}.")
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained=True and checkpoint={str(checkpoint)!r} exclude each other: pass one of them.")

    if checkpoint is not None:
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
        unstride_stem(model)
    return model


def _create(name: str, timm_kwargs: dict[str, Any], *, folder: Path | None = None, **loading: Any) -> Any:
    """`timm.create_model` for CNNs only; from a folder with the arguments that are saved there."""
    arguments = _ARGUMENTS_TO_STATE.get(name.split(".")[0], {}) | timm_kwargs
    model = timm.create_model(name if folder is None else f"local-dir:{folder}", **arguments, **loading)
    if not any(isinstance(module, nn.Conv2d) and key not in stem_names(model) for key, module in model.named_modules()):
        raise ValueError(
            f"{name} has no convolution beyond its patch embedding, and convolutions are what peft_edge adapts. "
            f"Choose a CNN, such as {', '.join(EDGE_FAMILIES.values())}."
        )
    return model


def _registry_name(name: str) -> str:
    """Returns `name` without the Hub's ``timm/``, if timm knows a model of that name."""
    registry_name = name.removeprefix("timm/")
    if timm.is_model(registry_name):
        return registry_name
    nearest = difflib.get_close_matches(registry_name, timm.list_models(), n=3, cutoff=0.5)
    hint = f" The nearest are {', '.join(nearest)}." if nearest else ""
    raise ValueError(
        f"{name!r} is neither a timm model nor an existing folder.{hint} timm.list_models() lists all models; "
        "the id of another Hub repository needs pretrained=True."
    )


def _from_hub(name: str, timm_kwargs: dict[str, Any]) -> Any:
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
            f"timm has no pretrained weights called {registry_name!r}; for this model it has: "
            f"{', '.join(tagged) or 'none'}. timm.list_pretrained() lists all of them."
        )
    hub_id = get_pretrained_cfg(registry_name).hf_hub_id
    # As a file, because from the Hub timm would fall back to unpickling where a repository has no safetensors.
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
            f"The Hub repository {repo_id!r} has no {file_name}. Pickled weights (.bin, .pth) are not read: "
            "convert them to safetensors and pass that file as checkpoint."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise OSError(
            f"{file_name} of {repo_id!r} is not in the local cache and could not be fetched from the Hub: {error}\n"
            "Without network, pass checkpoint=<folder written by save_backbone, or .safetensors file>, or "
            "pretrained=False for random weights (backbone.checkpoint and backbone.pretrained in a configuration)."
        ) from error


def _from_checkpoint(path: Path, name: str | None, timm_kwargs: dict[str, Any]) -> Any:
    """Builds the model and loads its weights; without a `name`, the model is the one that the folder names."""
    path = path.absolute()
    if path.is_dir():
        config = read_config(path / CONFIG_NAME)
        saved = config["architecture"]
        if name is not None and name.split(".")[0] != saved:
            raise ValueError(
                f"{path}: expected weights of {name!r}, found those of {saved!r}. "
                "Ask for that model, or pass another checkpoint."
            )
        model = _create(saved, config.get("model_args", {}) | timm_kwargs, folder=path)
        load_weights(model, path / WEIGHTS_NAME)
        _check_class_names(model, path / CONFIG_NAME)
        if config.get("small_images"):
            unstride_stem(model)
    elif name is not None and path.suffix == ".safetensors":
        model = _create(name, timm_kwargs)
        load_weights(model, path)
    else:
        raise FileNotFoundError(
            f"{path}: expected a folder written by save_backbone, or a .safetensors file, found "
            f"{'a file of another kind' if path.exists() else 'nothing'}. Pickled weights (.bin, .pth) are not read: "
            "convert them to safetensors first."
        )
    model.name_or_path = str(path)
    return model


def _check_class_names(model: Any, config: Path) -> None:
    try:
        class_names(model)
    except ValueError as error:
        raise ValueError(f"{config}: label_names do not fit the weights. {error}") from error
