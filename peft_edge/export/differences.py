"""The weights that an update changed: written for a device that has the others, and put in their place there."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge.backbones import class_names, fingerprint, replace_head, save_backbone, set_class_names
from peft_edge.backbones.heads import head_layers
from peft_edge.backbones.loading import CONFIG_NAME, WEIGHTS_NAME
from peft_edge.export.formats import merged
from peft_edge.files import atomic_write

METADATA_KEY, CHECKSUM_KEY = "peft_edge_diff", "peft_edge_diff_sha256"


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of itself."""

    base: str
    """Fingerprint of the model that it changes; see `peft_edge.backbones.fingerprint`."""

    result: str
    """Fingerprint of the model that this becomes."""

    class_names: list[str] | None
    """The names of the result's classes."""

    def checksum(self) -> str:
        """SHA-256 of what stands above; the tensors are in the fingerprint of the result."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def write_diff(base: nn.Module, model: nn.Module, file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Writes the tensors of a model, its adapters merged, that are not bit for bit those of its base.

    Args:
        base: The timm model that devices have.
        model: The same network adapted or trained further, with or without a head of another size; left as it is.
        file: Where to: safetensors, with the fingerprints of both models in its metadata; replaced if it exists.

    Returns:
        The tensors that were written, by their names.

    Raises:
        ValueError: The models are not the same network, or an adapter cannot be merged.
        OSError: The file cannot be written.
    """
    result = merged(model)
    before, after = base.state_dict(), result.state_dict()
    changed = {name: tensor for name, tensor in after.items() if name not in before or _differ(before[name], tensor)}
    what, advice = "the adapted model", "write the diff against its own base"
    # What a device will do.
    applied = _applied(base, changed, what, advice)
    if fingerprint(applied) != fingerprint(result) or _small_images(base) != _small_images(result):
        raise ValueError(f"{what} is another network than the base: {advice}")
    header = _Header(base=fingerprint(base), result=fingerprint(result), class_names=class_names(result))
    metadata = {METADATA_KEY: json.dumps(asdict(header)), CHECKSUM_KEY: header.checksum()}
    with atomic_write(Path(file)) as unfinished:
        save_file(changed, unfinished, metadata=metadata)
    return changed


def apply_diff(base: nn.Module, file: str | os.PathLike[str]) -> Any:
    """Returns the base with the tensors of a file by `write_diff`: bit for bit the model that this was made of.

    Args:
        base: The timm model that the file was written against; left as it is.
        file: The file. Nothing in it is believed before it is checked.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or was written against another model.
    """
    header, tensors = _read(Path(file))
    if (found := fingerprint(base)) != header.base:
        raise ValueError(
            f"{file} was written against another model: expected the fingerprint {header.base}, found {found}. Apply "
            "it to the model that it was written against, as that was before any other diff"
        )
    result = _applied(base, tensors, str(file), "copy it again from where it was made")
    try:
        set_class_names(result, header.class_names)
    except ValueError as error:
        raise _damaged(Path(file), error) from error
    if fingerprint(result) != header.result:
        raise _damaged(Path(file), "the result does not have the fingerprint that it says")
    return result


def save_result(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Saves a model as `save_backbone` does, as one step: a crash leaves the old folder or the new one.

    Raises:
        ValueError: The folder holds something else than a saved model.
        OSError: It cannot be written.
    """
    folder = Path(folder)
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG_NAME, WEIGHTS_NAME})
    if others:
        raise ValueError(f"{folder} would be replaced, and holds more than a saved model ({others[0]}): name another")
    with atomic_write(folder) as unfinished:
        save_backbone(model, unfinished)


def _read(file: Path) -> tuple[_Header, dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            header = TypeAdapter(_Header).validate_json(metadata[METADATA_KEY])
            if metadata[CHECKSUM_KEY] != header.checksum():
                raise ValueError("its metadata does not have the checksum that it says")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: name a file written by peft-edge diff") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error
    return header, tensors


def _damaged(file: Path, why: object) -> ValueError:
    return ValueError(
        f"{file}: expected a file written by peft-edge diff, found another or a damaged one ({why}). Copy it again "
        "from where it was made"
    )


def _applied(base: nn.Module, tensors: Mapping[str, Tensor], what: str, advice: str) -> Any:
    """A copy of the base with the tensors, its head as large as the one among them."""
    result = copy.deepcopy(base)
    for name, layer in head_layers(result):
        weight = tensors.get(f"{name}.weight", layer.weight)
        if weight.shape[1:] == layer.weight.shape[1:] and len(weight) != len(layer.weight):
            replace_head(result, len(weight))
            break
    _check_tensors(result, tensors, what, advice)
    result.load_state_dict({**result.state_dict(), **tensors})
    return result


def _small_images(model: nn.Module) -> bool:
    return getattr(model, "small_images", False)


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], what: str, advice: str) -> None:
    expected = model.state_dict()
    for name, tensor in tensors.items():
        place = expected.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            wanted = "no such tensor" if place is None else f"{place.dtype} {tuple(place.shape)}"
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{what} does not fit the base: {name}: expected {wanted}, found {found}; {advice}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name} holds values that are not finite; {advice}")


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or one.dtype != other.dtype or not torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    """Tells 0 from -0, which are equal as numbers."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
