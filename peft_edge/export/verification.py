"""Read test images, and compare the logits of an exported file with those of the PyTorch model on these images."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from peft_edge.backbones import class_names
from peft_edge.data import Domain, Task, build_transform, load_configured_task
from peft_edge.data.sources import domain_from_splits, file_hashes, read_splits
from peft_edge.data.task import EMBEDDED
from peft_edge.export.formats import Network
from peft_edge.profiling.tables import text_table

CALIBRATION_SIZE = 100
COMPARISON_SIZE = 256
# The keys of timm's data configuration that an exported file contains.
PREPROCESSING_KEYS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
TEST_SIZE = 1000  # largest number of images that `peft-edge export --test` uses of each dataset


class Images(NamedTuple):
    """Preprocessed images for calibration and for comparison.

    Attributes:
        calibration: At most `CALIBRATION_SIZE` training images (N, C, H, W), to compute the quantisation scales.
        comparison: Test images (M, C, H, W). M is at most the argument `comparison_size` of `read_images`.
        labels: Class indices (M,) of `comparison`. An index is a position in the logits of the model. None if the model
            has no class names, or does not know all classes of the images.
    """

    calibration: Tensor
    comparison: Tensor
    labels: Tensor | None


def read_images(
    name: str,
    model: nn.Module,
    *,
    image_size: int | None = None,
    run: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    comparison_size: int = COMPARISON_SIZE,
) -> Images:
    """Read images for 8-bit calibration and for comparison, and preprocess them as `model` needs for evaluation.

    If `run` is given, the images for comparison contain none on which this run trained. If the dataset `name` was used
    in the run, it is split into training and test images as in the run. From any other dataset, copies of the run's
    training images are left out. If the run used `digits` or `shapes`, nothing is left out, because other datasets
    contain no copies of these images.

    Args:
        name: `digits`, `shapes`, a folder with one subfolder per class, or a Hugging Face dataset. With `run`, also
            `source` (the data that the run's network learned first) or `target` (the new data to which it was adapted).
        model: A timm model, or a PEFT model with a timm base.
        image_size: Height and width in pixels. By default, `input_size` in timm's data configuration of the model.
        run: The configuration of the run that trained the model. It is `run_info.train_config` in the run's
            `record.json`.
        fingerprint: The hash of the run's images at the time of the run. It is the field `data_fingerprint` of the
            run's `Record`. If the images are from a folder or a Hugging Face dataset and their hash is different today,
            an error is raised, because the split into training and test images may have changed.
        comparison_size: The maximum number of images for comparison.

    Raises:
        ValueError: If `name` or `image_size` is invalid, an image is unreadable, there are too few images, the run
            trained on all test images, or the images of the run have changed since the run.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, found {image_size}")
    config = input_config(model, image_size)
    size = config["input_size"][-1]
    domain = _read_domain(name, size) if run is None else _untrained_domain(name, size, run, fingerprint)
    transform = build_transform(config, train=False)
    train, test = _sample(domain.train, CALIBRATION_SIZE), _sample(domain.test, comparison_size)
    known, labels = class_names(model), None
    names = test.features["label"].names
    if known is not None and set(names) <= set(known):
        labels = torch.tensor([known.index(names[label]) for label in test["label"][:]])
    return Images(
        calibration=torch.stack([transform(image) for image in train["image"]]),
        comparison=torch.stack([transform(image) for image in test["image"]]),
        labels=labels,
    )


def input_config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return timm's data configuration of a model. With `image_size`, `input_size` is (3, image_size, image_size)."""
    config = resolve_model_data_config(model)
    return config if image_size is None else {**config, "input_size": (3, image_size, image_size)}


def _read_domain(name: str, image_size: int) -> Domain:
    if name in EMBEDDED:
        return EMBEDDED[name](image_size=image_size, seed=0)[0]
    if not Path(name).is_dir() and name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: expected a folder with one subfolder of images for each class, found no folder")
    return domain_from_splits(name, read_splits(name), train_split="train", seed=0)


def _untrained_domain(name: str, image_size: int, run: Mapping[str, Any], fingerprint: str | None) -> Domain:
    """Return the splits of the dataset `name`. The test split contains no image that the run trained on.

    `name` may also be `source` (the data that the run's network learned first) or `target` (the new data to which it
    was adapted last). If the run did not use the dataset `name`, copies of images that the run trained on are removed
    from the test split. If the run used an embedded benchmark (`digits` or `shapes`), nothing is removed, because other
    datasets contain no copies of its images.
    """
    data, seed = {**run["data"], "image_size": image_size}, run["seed"]
    known = {"source": data["name"], "target": data.get("shift")}
    role = next((role for role, other in known.items() if other and is_same_data(name, other)), None)
    if name in known and not Path(name).is_dir():
        task = _run_task(name, data, seed, fingerprint)
        return task.source if name == "source" else task.targets[-1]
    if role is None and data["name"] in EMBEDDED:
        return _read_domain(name, image_size)
    task = _run_task(name, data, seed, fingerprint)
    if role == "source" and data.get("new_classes"):
        # The run has divided the classes of this dataset between `task.source` and `task.targets`. Join the splits of
        # all these domains, so that the result contains all classes. Only the `features` of the last target list all
        # classes.
        features = task.targets[-1].test.features
        domains = (task.source, *task.targets)
        train, test = (
            concatenate_datasets([split.cast(features) for split in splits])
            for splits in ([domain.train for domain in domains], [domain.test for domain in domains])
        )
        return Domain(train=train, validation=task.targets[-1].validation, test=test)
    if role is not None:
        return task.source if role == "source" else task.targets[0]
    trained = {content for domain in (task.source, *task.targets) for content in file_hashes(domain.train)}
    domain = _read_domain(name, image_size)
    contents = file_hashes(domain.test)
    rows = [row for row, content in enumerate(contents) if content not in trained]
    if not rows:
        raise ValueError(f"{name}: the run has trained on all {len(contents)} test images: name other images")
    return replace(domain, test=domain.test.select(rows))


def is_same_data(name: str, other: str) -> bool:
    """Return whether the two names are equal, or are paths of the same folder."""
    folders = Path(name).expanduser(), Path(other).expanduser()
    return name == other or (folders[0].is_dir() and folders[0].resolve() == folders[1].resolve())


@functools.lru_cache(maxsize=1)  # a command may need the data of the same run several times
def _load_task(data: str, seed: int) -> Task:
    return load_configured_task(json.loads(data), seed=seed)


def _run_task(name: str, data: Mapping[str, Any], seed: int, fingerprint: str | None) -> Task:
    try:
        task = _load_task(json.dumps(dict(data)), seed)
        # Do not check data sets that are part of this package, because their images never change. Their fingerprint
        # depends on the image size, which may be another one here than in the run.
        is_embedded = {data["name"], data.get("shift")} & EMBEDDED.keys()
        if fingerprint is not None and task.fingerprint != fingerprint and not is_embedded:
            raise ValueError(
                f"its images have changed since the run, or another version of peft-edge divided them (fingerprint "
                f"{task.fingerprint}, in the record {fingerprint}); restore them"
            )
    except ValueError as error:
        raise ValueError(
            f"{name}: the images that the run trained on cannot be excluded, because its data {data['name']!r} cannot "
            f"be read as in the run: {error}. To compare without this exclusion, name a copy of the adapter without "
            "the record of the run"
        ) from error
    return task


def _sample(images: Dataset, size: int) -> Dataset:
    return images.shuffle(seed=0).select(range(min(size, len(images))))


def predict_logits(network: Network, images: Tensor, batch_size: int | None) -> Tensor:
    """Return the logits (N, num_classes) for images (N, C, H, W). `iter_batches` divides the images into batches."""
    with torch.no_grad():
        return torch.cat([network(batch) for batch in iter_batches(images, batch_size)])[: len(images)]


def iter_batches(images: Tensor, batch_size: int | None) -> Iterator[Tensor]:
    """Yield batches of `batch_size` images. If the last batch is smaller, it is padded with copies of its last image.

    If `batch_size` is None, yield batches of at most 32 images without padding.
    """
    for batch in images.split(batch_size or 32):
        missing = (batch_size or len(batch)) - len(batch)
        yield torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between an exported file and the PyTorch model that was exported, on the same images.

    Attributes:
        name: The format, followed by `int8` if the file is quantised.
        size_bytes: The size of the file in bytes.
        largest_logit: Largest absolute logit of the model.
        largest_difference: Largest absolute difference between the logits of the file and of the model.
        same_top1: Fraction of images for which the file and the model predict the same class.
        accuracy: Fraction of images that the file classifies correctly; None without labels.
        model_accuracy: Fraction of images that the model classifies correctly; None without labels.
        accuracies: The accuracy of the file on the images of each folder or dataset. The keys of this dict are the
            names of the folders and datasets. It is empty if `compare_logits` got no `folders` or no `labels`.
        model_accuracies: The same dict as `accuracies`, but with the accuracy of the model.
    """

    name: str
    size_bytes: int
    largest_logit: float
    largest_difference: float
    same_top1: float
    accuracy: float | None
    model_accuracy: float | None
    accuracies: Mapping[str, float] = field(default_factory=dict)
    model_accuracies: Mapping[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """A dict from each name in `accuracies` to the accuracy of the model minus the accuracy of the file."""
        return {name: self.model_accuracies[name] - accuracy for name, accuracy in self.accuracies.items()}


def compare_logits(
    name: str,
    size_bytes: int,
    found: Tensor,
    expected: Tensor,
    labels: Tensor | None,
    folders: Sequence[str] = (),
) -> Comparison:
    """Compare `found`, the logits (N, num_classes) of an exported file, with the logits `expected` of its model.

    `labels` are the class indices (N,). If they are given, the accuracies of the file and the model are computed.
    `folders` lists, for each image, the name of its folder or dataset. If `labels` and `folders` are given, the
    accuracies are computed for each folder or dataset, too. `name` and `size_bytes` describe the file, and are copied
    into the result.
    """

    def accuracy(logits: Tensor, classes: Tensor) -> float:
        return (logits.argmax(1) == classes).float().mean().item()

    def by_folder(logits: Tensor) -> dict[str, float]:
        if labels is None:
            return {}
        rows = {name: torch.tensor([folder == name for folder in folders]) for name in dict.fromkeys(folders)}
        return {name: accuracy(logits[chosen], labels[chosen]) for name, chosen in rows.items()}

    return Comparison(
        name=name,
        size_bytes=size_bytes,
        largest_logit=expected.abs().max().item(),
        largest_difference=(found - expected).abs().max().item(),
        same_top1=accuracy(found, expected.argmax(1)),
        accuracy=None if labels is None else accuracy(found, labels),
        model_accuracy=None if labels is None else accuracy(expected, labels),
        accuracies=by_folder(found),
        model_accuracies=by_folder(expected),
    )


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a text table with a row for each file.

    If the accuracy of the PyTorch model is known, a row above those of the files shows it. If the images are from
    several folders or datasets, the table has one accuracy column for each of them. Otherwise, it has a single accuracy
    column.
    """
    folders = list(comparisons[0].accuracies)
    titles = [f"accuracy on {folder}" for folder in folders] if len(folders) > 1 else ["accuracy"]
    rows = [["", "bytes", "largest difference of a logit", "same top-1", *titles]]
    model_accuracy = comparisons[0].model_accuracy
    if model_accuracy is not None:
        expected: list[float] = list(comparisons[0].model_accuracies.values()) or [model_accuracy]
        rows.append(["PyTorch", "", "", "", *(f"{accuracy:.3f}" for accuracy in expected)])
    for row in comparisons:
        measured: list[float | None] = [*row.accuracies.values()] or [row.accuracy]
        accuracies = ["-" if accuracy is None else f"{accuracy:.3f}" for accuracy in measured]
        difference = f"{row.largest_difference:.1e}"
        rows.append([row.name, f"{row.size_bytes:,}", difference, f"{row.same_top1:.3f}", *accuracies])
    return text_table(rows)
