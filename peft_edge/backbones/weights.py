"""Read weights from a file that another program wrote, and match the tensors in the file with those of a timm model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from peft_edge.backbones.heads import as_timm_model, head_layers, set_class_names

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class WeightMatch:
    """An assignment of the tensors in a file to the tensors of a model.

    Attributes:
        source: The name of the file.
        names: A dict from the name of each matched tensor in the model to its name in the file.
        is_by_name: True if the tensors were matched by name, False if they were matched by order. A prefix that all
            names in the file share is ignored.
        num_classes: The number of classes of the head in the file, or None if the file has no head.
    """

    source: str
    names: Mapping[str, str]
    is_by_name: bool
    num_classes: int | None

    def __str__(self) -> str:
        head = "no head" if self.num_classes is None else f"a head for {self.num_classes:,} classes"
        how = "by name"
        if not self.is_by_name:
            (first, first_in_file), *_, (last, last_in_file) = self.names.items()
            how = f"by order and shape ({first_in_file} -> {first}, ..., {last_in_file} -> {last})"
        return f"{self.source}: matched all {len(self.names)} tensors {how}; the file has {head}"


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors file, or in a file that `torch.save` wrote (.pth, .pt, .bin, ...).

    Pickled files are read with ``weights_only=True``, so no code in the file runs. If the file contains a checkpoint,
    the state dict may be an entry such as `state_dict` or `model`. If the checkpoint also has an exponential moving
    average of the weights (`state_dict_ema` or `model_ema`), this average is returned instead. The name prefixes that
    DataParallel (`module.`) and torch.compile (`_orig_mod.`) add are removed.

    Raises:
        FileNotFoundError: If the file does not exist, or its suffix is not in `WEIGHTS_SUFFIXES`.
        ValueError: If the file is damaged, contains no state dict, or contains objects that ``weights_only=True``
            rejects.
    """
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file. Pass the path of the file with weights.")
    if not path.is_file() or path.suffix not in WEIGHTS_SUFFIXES:
        found = "a folder" if path.is_dir() else "a file of another kind"
        raise FileNotFoundError(f"{path}: expected a file that ends in {', '.join(WEIGHTS_SUFFIXES)}, found {found}.")
    try:
        content: dict[str, object] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise many types for a damaged file
        if isinstance(error.__cause__, UnpicklingError) and (names := _unsafe_objects(path)):
            raise ValueError(
                f"{path}: expected a state dict of tensors, found {', '.join(names[:3])}, which PyTorch does not read "
                "safely. If you trust the file, load it in the program that wrote it, and save only model.state_dict()."
            ) from error
        raise ValueError(
            f"{path}: expected weights, found a damaged file of {path.stat().st_size:,} bytes, or one of another "
            "format. Copy it again, or save model.state_dict() with torch.save or safetensors."
        ) from error

    inner = [value for value in content.values() if isinstance(value, Mapping) and _is_state_dict(value)]
    if len(inner) == 1:
        content = clean_state_dict(dict(inner[0]))
    content.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    if not _is_state_dict(content):
        raise ValueError(
            f"{path}: expected a state dict of tensors, found the keys {', '.join(map(str, list(content)[:5]))}. Save "
            "model.state_dict() with torch.save or safetensors."
        )
    return cast(dict[str, Tensor], content)


def _unsafe_objects(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # the pickle is damaged
        return []


def _is_state_dict(values: Mapping[str, object]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values.values())


def match_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str, is_ordered: bool = True
) -> WeightMatch:
    """Match the tensors of `weights` with those of a timm model: by name, or by order if the names differ.

    A prefix that all names in `weights` share is ignored. In each pair of tensors, the shapes must be equal, except for
    the number of classes in the head. The last components of the two names, such as `weight` or `running_mean`, must
    also be equal. A match by order may exchange two tensors of the same shape and kind. Therefore, after a match by
    order, check the accuracy on images. `weights` may lack the head and the counters `num_batches_tracked`. `source` is
    the name of the file, for messages. Pass `is_ordered=False` if the order of `weights` is not that of the model's
    state dict. In this case, tensors are matched only by name.

    Raises:
        TypeError: If the model was not built by timm.
        ValueError: If a tensor has no counterpart and is not one of those that `weights` may lack. If the two tensors
            of a pair do not fit each other. If names differ and a match by order is not allowed. A match by order is
            not allowed if `is_ordered` is False, or if more than half of the model's names are in `weights`.
    """
    architecture = as_timm_model(model).pretrained_cfg["architecture"]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if not any(name.endswith("num_batches_tracked") for name in found):
        expected = {name: shape for name, shape in expected.items() if not name.endswith("num_batches_tracked")}
    head = [f"{name}.{kind}" for name, layer in head_layers(model) for kind, _ in layer.named_parameters()]
    body = [name for name in expected if name not in head]

    levels = zip(*(name.split(".")[:-1] for name in found), strict=False)
    prefix = "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))
    by_name = [{name: name for name in found}, {name.removeprefix(prefix): name for name in found}]
    pairs = next((names for names in by_name if names.keys() in (expected.keys(), set(body))), None)
    is_by_name = pairs is not None
    if pairs is None and (not is_ordered or len(expected.keys() & found.keys()) > len(expected) / 2):
        missing, extra = ([*names] for names in (expected.keys() - found.keys(), found.keys() - expected.keys()))
        hint = "" if is_ordered else " A safetensors file has no order: if only the names differ, import a .pth file."
        raise ValueError(
            f"{source} does not fit {architecture}. The file lacks {len(missing)} tensors "
            f"({', '.join(sorted(missing)[:2])}), and has {len(extra)} others ({', '.join(sorted(extra)[:2])}). Pass "
            f"the name and the arguments of the model that was saved.{hint}"
        )
    if pairs is None:
        pairs = dict(zip(body if len(found) == len(body) else expected, found, strict=False))
    problems = [
        f"{name} has shape {expected[name]}, and its counterpart {name_in_file} has shape {found[name_in_file]}"
        for name, name_in_file in pairs.items()
        # The first dimension of a head is the number of classes.
        if expected[name][name in head :] != found[name_in_file][name in head :]
        or name.rpartition(".")[2] != name_in_file.rpartition(".")[2]
        or (not is_by_name and name_in_file in expected and name_in_file != name)
    ]
    if not is_by_name and len(found) not in (len(expected), len(body)):
        problems.append(f"the model has {len(expected)} tensors and the file has {len(found)}")
    if problems:
        how = "by name" if is_by_name else "by order, because the names differ"
        raise ValueError(
            f"{source} does not fit {architecture}. Compared {how}, the first difference is: {problems[0]}. Pass the "
            "name and the arguments of the model that was saved."
        )
    num_classes = next((len(weights[pairs[name]]) for name in head if name in pairs), None)
    return WeightMatch(source, {name: pairs[name] for name in expected if name in pairs}, is_by_name, num_classes)


def import_weights(model: nn.Module, file: str | os.PathLike[str]) -> WeightMatch:
    """Replace the weights of a timm model in place by those in a file that another program wrote.

    If the file has a head with another number of classes, the model first gets a new head with this number. If the file
    has no head, the model keeps its head. If an error is raised, the model is unchanged. See :func:`read_weights` for
    the formats, and :func:`match_weights` for the rules of matching.

    Raises:
        TypeError: If the model was not built by timm.
        FileNotFoundError: If the file does not exist, or its suffix is not in `WEIGHTS_SUFFIXES`.
        ValueError: If the file is damaged, has no state dict, or does not fit the model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from timm import create_model
        >>> model, trained = create_model("mobilenetv2_035"), create_model("mobilenetv2_035", num_classes=3)
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": trained.state_dict()}, f"{folder}/weights.pth")
        ...     match = import_weights(model, f"{folder}/weights.pth")
        >>> len(match.names), match.is_by_name, match.num_classes, model.num_classes
        (314, True, 3, 3)
    """
    weights = read_weights(file)
    match = match_weights(model, weights, source=str(file), is_ordered=Path(file).suffix != ".safetensors")
    if match.num_classes is not None and match.num_classes != as_timm_model(model).num_classes:
        as_timm_model(model).reset_classifier(match.num_classes)
        set_class_names(model, None)
    # `strict=False` is safe, because `match_weights` has checked all names. Only the head and the counters
    # `num_batches_tracked` may be missing.
    model.load_state_dict({name: weights[in_file] for name, in_file in match.names.items()}, strict=False)
    return match
