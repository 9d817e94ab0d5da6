"""Adapters on the disk and on the Hub: save one with the card that says how to load it, load one with its backbone."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from peft_edge.backbones import class_names, grow_head, head_names, load_backbone, replace_head, set_class_names
from peft_edge.files import written_whole

LABELS_NAME = "label_names.json"

_CARD = """---
library_name: peft
{base_model}tags:
- peft-edge
- {peft_type}
---

# {peft_type} adapter for `{base}`

Made with [PEFT](https://github.com/huggingface/peft) and peft-edge. The backbone and this adapter in one call:

```python
import peft_edge
model = peft_edge.load_pretrained("path/or/hub-id/of/this/adapter")
```

With PEFT alone `import peft_edge` still comes first: it makes `{peft_type}` known to PEFT, which otherwise stops with
`KeyError: '{peft_type}'`.

```python
import peft_edge
from peft import PeftModel
model = PeftModel.from_pretrained(backbone, "path/or/hub-id/of/this/adapter")
```
"""


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter, the names of its classes, and a card with the lines that load it; replaces what is there.

    Args:
        model: The adapted model; its active adapter is saved.
        folder: Where to. It appears whole or not at all.

    Raises:
        ValueError: There are not as many class names as classes.
        OSError: The folder cannot be written.
    """
    names = class_names(model)
    config = model.peft_config[model.active_adapter]
    base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None) or "unknown"
    card = _CARD.format(
        # The Hub only takes its own ids there, not paths.
        base_model=f"base_model: {base}\n" if base.startswith("timm/") else "",
        base=base if base.startswith("timm/") else Path(base).name,
        peft_type=config.peft_type.value,
    )
    with written_whole(Path(folder)) as unfinished:
        # Without the argument, PEFT asks the Hub how large the base model's vocabulary is.
        model.save_pretrained(str(unfinished), selected_adapters=[model.active_adapter], save_embedding_layers=False)
        # PEFT puts an adapter that is not called "default" into a folder of its name.
        for file in list(unfinished.glob(f"{model.active_adapter}/*")):
            file.rename(unfinished / file.name)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if names is not None:
            (unfinished / LABELS_NAME).write_text(json.dumps(names), encoding="utf-8")


def load_pretrained(
    adapter: str | os.PathLike[str], *, base: nn.Module | None = None, revision: str | None = None
) -> PeftModel:
    """Loads an adapter together with the backbone it was trained on.

    Args:
        adapter: A folder written by `save_adapter` or PEFT's `save_pretrained`, or the id of one on the Hub.
        base: The backbone, where it cannot be loaded by the name in the adapter's configuration; adapted in place. Its
            head is made as large as the adapter's, where the adapter has one.
        revision: A branch, tag or commit on the Hub.

    Returns:
        The adapted model in eval mode: images of shape (B, C, H, W) to logits (B, num_classes), whose names
        `peft_edge.backbones.class_names` gives.

    Raises:
        FileNotFoundError: There is no such folder or repository, a file in it is missing, or the backbone's is.
        ValueError: A file is damaged, or the adapter was made for another backbone; the message names the first
            tensor that does not fit.
    """
    folder = _folder_of(adapter, revision)
    base_name = _read_base_name(folder / CONFIG_NAME)
    shapes = _read_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    if base is None:
        base = _load_base(base_name, folder)
    _fit_head(base, shapes)
    _name_classes(base, folder / LABELS_NAME)
    try:
        with warnings.catch_warnings():
            # PEFT warns of missing tensors and passes over those that are too many; below, both are errors.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(_misfit(folder, base_name, " ".join(f"{type(error).__name__}: {error}".split()))) from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if differing := sorted(expected.keys() ^ shapes.keys()):
        name = differing[0]
        problem = "is not in the adapter" if name in expected else "has no place in this backbone"
        raise ValueError(_misfit(folder, base_name, f"{name} {problem}, and so for {len(differing)} tensors in all"))
    return model.eval()


def _folder_of(adapter: str | os.PathLike[str], revision: str | None) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        files = ["adapter_*", LABELS_NAME, "README.md"]
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{adapter}: expected the folder of an adapter, or the id of one on the Hub. No such folder exists, and "
            f"from the Hub: {reason}"
        ) from error


def _read_base_name(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {path.parent} holds no adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the configuration of an adapter, found something else ({error!r})"
        ) from error


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """The name and shape of every tensor in the file, read from its header."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing. Pickled adapters (adapter_model.bin) are not read: save it again as safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged: {path.stat().st_size} bytes are no whole safetensors file ({error}). "
            "Copy it again from where it was made"
        ) from error


def _load_base(name: str | None, folder: Path) -> nn.Module:
    if not name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model: pass the backbone as base=")
    if Path(name).is_absolute():
        if not Path(name).exists():
            raise FileNotFoundError(
                f"{name}, the backbone of {folder}, is not there: put it back, or pass the backbone as base="
            )
        return load_backbone(name)
    base = load_backbone(name, pretrained="/" in name)
    if "/" not in name:
        warnings.warn(f"{folder} was trained on a {name} with random weights, and gets other ones", stacklevel=3)
    return base


def _fit_head(base: Any, shapes: dict[str, list[int]]) -> None:
    """Gives the backbone a head as large as the adapter's; one that grows keeps its rows."""
    for head in head_names(base) if hasattr(base, "get_classifier") else ():
        classes = shapes.get(f"base_model.model.{head}.weight", [base.num_classes])[0]
        if classes > base.num_classes:
            grow_head(base, classes)
        elif classes < base.num_classes:
            replace_head(base, classes)


def _name_classes(base: nn.Module, path: Path) -> None:
    if not path.exists():
        return
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of texts, found {type(names).__name__}")
        set_class_names(base, names)
    except ValueError as error:
        raise ValueError(
            f"{path} does not name the classes of the adapter: {error} Copy it again, or delete it"
        ) from error


def _misfit(folder: Path, base_name: str | None, problem: str) -> str:
    return (
        f"{folder}: the adapter does not fit this backbone: {problem}. It was made for {base_name}: load that one, or "
        "pass another as base="
    )
