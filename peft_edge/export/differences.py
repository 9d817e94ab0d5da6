"""Write a file with the tensors that an adaptation changed, and apply this file to the base model on a device."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge.backbones import class_names, fingerprint, replace_head, save_backbone, set_class_names
from peft_edge.backbones.heads import head_layers
from peft_edge.backbones.loading import CONFIG_NAME, WEIGHTS_NAME
from peft_edge.export.exporter import merge_adapters
from peft_edge.files import atomic_write
from peft_edge.tuners.injection import base_parameters

DIFF_KEY, CHECKSUM_KEY = "peft_edge_diff", "peft_edge_diff_sha256"


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The metadata of a diff file. A diff file contains the tensors that an adaptation changed.

    `base` is the fingerprint (a hash of all tensors) of the base model, and `result` is the fingerprint of the adapted
    model with merged adapters. `class_names` are the class names of the adapted model.
    """

    base: str
    result: str
    class_names: list[str] | None

    def checksum(self) -> str:
        """Return the SHA-256 of the metadata, which are all fields of this object.

        The tensors of the diff file are not included. `apply_diff` detects damaged tensors in another way: it compares
        the fingerprint of the patched model with the field `result`.
        """
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def write_diff(
    base: nn.Module, model: nn.Module, file: str | os.PathLike[str], *, allow_other_base: bool = False
) -> dict[str, Tensor]:
    """Write a file with the tensors that differ between `base` and a copy of `model` with merged adapters.

    Tensors are compared bit by bit. If a tensor differs, the file contains the version of the merged copy.

    Args:
        base: The timm model to which `apply_diff` will later apply the file, on a device. It is not changed.
        model: The adapted or fully trained network. It is not changed. Its head may have another number of classes than
            the head of `base`.
        file: The safetensors file to write or replace. Its metadata contains the fingerprints (hashes) of `base` and
            of the merged copy of `model`.
        allow_other_base: Whether to accept a PEFT model whose base model has other weights than `base`. The diff file
            then also contains the weights of this base model that differ from those of `base`.

    Returns:
        A dict from the names of the written tensors to these tensors.

    Raises:
        ValueError: If the architectures differ, an adapter cannot be merged, or a tensor to write is not finite. If
            `model` is a PEFT model whose base model has other weights than `base`, and `allow_other_base` is False.
        OSError: If the file cannot be written.
    """
    if isinstance(model, PeftModel) and not allow_other_base:
        own, given = base_parameters(model), dict(base.named_parameters())
        if other := [name for name in own if name in given and _differ(own[name], given[name])]:
            raise ValueError(
                f"the adapted model has another base: {other[0]} differs, {len(other)} of {len(own)} tensors in all. "
                "Pass the base that the adapter was loaded with, or write the differences of the base, too "
                "(allow_other_base=True or --allow-other-base)"
            )
    result = merge_adapters(model)
    before, after = base.state_dict(), result.state_dict()
    changed = {name: tensor for name, tensor in after.items() if name not in before or _differ(before[name], tensor)}
    what, advice = "the adapted model", "write the diff against its own base"
    applied = _apply_tensors(base, changed, what, advice)  # as `apply_diff` does on the device
    same_stem = getattr(base, "small_images", False) == getattr(result, "small_images", False)
    if fingerprint(applied) != fingerprint(result) or not same_stem:
        raise ValueError(f"{what} is another network than the base: {advice}")
    header = _Header(base=fingerprint(base), result=fingerprint(result), class_names=class_names(result))
    metadata = {DIFF_KEY: json.dumps(asdict(header)), CHECKSUM_KEY: header.checksum()}
    with atomic_write(Path(file)) as unfinished:
        save_file(changed, unfinished, metadata=metadata)
    return changed


def apply_diff(base: nn.Module, file: str | os.PathLike[str]) -> nn.Module:
    """Return a copy of `base` in which the tensors in `file` replace the tensors of the same names.

    The copy is bit-identical to the merged model from which `write_diff` took the tensors.

    Args:
        base: A timm model with the same tensors as the argument `base` of `write_diff`. It is not changed.
        file: A file that `write_diff` wrote. It contains a checksum and fingerprints (hashes), which reveal damage.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, or was written for a base with another fingerprint.
    """
    header, tensors = _read(Path(file))
    if (found := fingerprint(base)) != header.base:
        raise ValueError(
            f"{file} was written against another model: expected the fingerprint {header.base}, found {found}. Apply "
            "it to the model that it was written against, before any other diff is applied"
        )
    result = _apply_tensors(base, tensors, str(file), "copy the file again from its source")
    try:
        set_class_names(result, header.class_names)
    except ValueError as error:
        raise _damaged(Path(file), error) from error
    if fingerprint(result) != header.result:
        raise _damaged(Path(file), "the result does not have the fingerprint in the metadata")
    return result


def save_result(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model with `save_backbone`. Create or replace `folder` only after all files have been written.

    Raises:
        ValueError: If `folder` contains other files than those of a saved model.
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG_NAME, WEIGHTS_NAME})
    if others:
        raise ValueError(f"{folder} contains more than a saved model ({others[0]}): name another folder")
    with atomic_write(folder) as unfinished:
        save_backbone(model, unfinished)


def _read(file: Path) -> tuple[_Header, dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            header = TypeAdapter(_Header).validate_json(metadata[DIFF_KEY])
            if metadata[CHECKSUM_KEY] != header.checksum():
                raise ValueError("the metadata does not match its checksum")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: name a file written by peft-edge diff") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error
    return header, tensors


def _damaged(file: Path, reason: object) -> ValueError:
    return ValueError(
        f"{file}: expected a file written by peft-edge diff, found another or a damaged file ({reason}). Copy the file "
        "again from its source"
    )


def _apply_tensors(base: nn.Module, tensors: Mapping[str, Tensor], what: str, advice: str) -> nn.Module:
    """Return a copy of `base` in which `tensors` replace the tensors of the same names.

    If `tensors` contains a head with another number of classes, the head of the copy first gets this number of classes.
    If a tensor does not fit or is not finite, raise a ValueError. Its message starts with `what` and ends with
    `advice`.
    """
    result = copy.deepcopy(base)
    for name, layer in head_layers(result):
        weight = tensors.get(f"{name}.weight", layer.weight)
        if weight.shape[1:] == layer.weight.shape[1:] and len(weight) != len(layer.weight):
            replace_head(result, len(weight))
            break
    expected = result.state_dict()
    for name, tensor in tensors.items():
        place = expected.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            wanted = "no such tensor" if place is None else f"{place.dtype} {tuple(place.shape)}"
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{what} does not fit the base: {name}: expected {wanted}, found {found}; {advice}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name} holds values that are not finite; {advice}")
    result.load_state_dict({**expected, **tensors})
    return result


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether shape, dtype or bytes differ. 0 and -0 have different bytes, although the numbers are equal."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    first, second = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return not torch.equal(first, second)
