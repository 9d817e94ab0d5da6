"""Loading timm's edge CNNs with pretrained, local or random weights.

What a backbone is called matters to PEFT: it writes ``model.name_or_path`` into every adapter as
``base_model_name_or_path``. timm leaves that attribute unset, so :func:`load_backbone` sets it, to something that
:func:`load_backbone` accepts again.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from timm.models import get_pretrained_cfg
from torch import nn

from peft_edge.backbones.checkpoints import CONFIG_NAME, WEIGHTS_NAME, load_weights, read_config
from peft_edge.backbones.heads import class_names, replace_head
from peft_edge.backbones.stems import stem_names, unstride_stem

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
