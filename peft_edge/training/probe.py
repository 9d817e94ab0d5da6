"""Check imported weights on labelled photographs, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    ImageNetInfo,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from peft_edge.backbones import class_names, load_backbone
from peft_edge.backbones.heads import as_timm_model
from peft_edge.data import build_transform
from peft_edge.data.domain import stratified_split
from peft_edge.data.sources import domain_from_splits, read_splits
from peft_edge.profiling.tables import text_table

MEAN_SIZE, TEST_SIZE = 20, 200  # maximum numbers of images: training images per class, and test images
IMPORTED, RANDOM = "as imported", "random weights"
NORMALISATIONS = {
    "mean and std of ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "mean and std 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}


@dataclass(frozen=True)
class WeightProbe:
    """The accuracies of a network on images that it was not trained on.

    Attributes:
        class_mean: The accuracy of nearest-class-mean classification for each setting. The settings are `IMPORTED` (the
            given weights and preprocessing), names of other input normalisations, and `RANDOM` (random weights).
        head: The accuracy of the network's own head. None if the classes of the head are unknown or lack a class of the
            images.
    """

    class_mean: Mapping[str, float]
    head: float | None

    @property
    def warnings(self) -> list[str]:
        """Messages about probable mistakes in the weights or their preprocessing. Empty if nothing is suspicious."""
        imported, random = self.class_mean[IMPORTED], self.class_mean[RANDOM]
        found = []
        if imported < random + 0.05:
            found.append(
                "Warning: the features are hardly better than those of random weights. The tensors may be matched "
                "wrongly, or the weights may belong to another model"
            )
        for name, (mean, std) in NORMALISATIONS.items():
            if self.class_mean.get(name, 0) > imported + 0.02:
                values = " ".join(["--mean", *map(str, mean), "--std", *map(str, std)])
                found.append(f"Warning: {name} give a better accuracy. Were the weights trained with {values}?")
        return found

    def __str__(self) -> str:
        rows = [("", "nearest class mean", "head")]
        for name, accuracy in self.class_mean.items():
            head = "-" if self.head is None or name != IMPORTED else f"{self.head:.3f}"
            rows.append((name, f"{accuracy:.3f}", head))
        return "\n".join([text_table(rows), *(self.warnings or ["The weights and the preprocessing seem right."])])


def probe_weights(model: nn.Module, folder: str) -> WeightProbe:
    """Measure how well the features of a timm model separate the classes of labelled images, without training.

    Each test image gets the class whose mean feature has the largest cosine similarity with the image's feature, as in
    nearest-class-mean classification (Mensink et al. 2013). Features are the inputs of the head, minus their mean over
    the training images. The images are classified again with other input normalisations, and with random weights. If
    one of these changes improves the accuracy, the weights of `model` or their preprocessing are probably wrong.

    Args:
        model: A timm model. It is not changed.
        folder: A folder with one subfolder for each class, or a Hugging Face dataset. Class means are computed on its
            training images, and accuracies on its test images.

    Raises:
        ValueError: If the images cannot be read, or there are too few.
    """
    domain = domain_from_splits(folder, read_splits(folder), train_split="train", seed=0)
    train, test = domain.train, domain.test.shuffle(seed=0).select(range(min(TEST_SIZE, len(domain.test))))
    if len(train) > MEAN_SIZE * domain.num_classes:
        train = stratified_split(train, MEAN_SIZE * domain.num_classes, seed=0)[1]
    config = resolve_model_data_config(model)
    settings = {IMPORTED: (model, config)}
    for name, (mean, std) in NORMALISATIONS.items():
        if (tuple(config["mean"]), tuple(config["std"])) != (mean, std):
            settings[name] = (model, {**config, "mean": mean, "std": std})
    torch.manual_seed(0)
    settings[RANDOM] = (load_backbone(as_timm_model(model).pretrained_cfg["architecture"]), config)

    truth, was_training = torch.tensor(test["label"][:]), model.training
    accuracies, head = {}, None
    for name, (network, data_config) in settings.items():
        features, _ = _predict(network, data_config, train, f"{name}, training images")
        found, logits = _predict(network, data_config, test, f"{name}, test images")
        accuracies[name] = class_mean_accuracy(features, torch.tensor(train["label"][:]), found, truth)
        outputs = head_outputs(model, domain.class_names) if name == IMPORTED else None
        if outputs is not None:
            head = (logits.argmax(1) == torch.tensor(outputs)[truth]).float().mean().item()
    model.train(was_training)
    return WeightProbe(accuracies, head)


def _predict(model: nn.Module, data_config: Mapping[str, Any], images: Dataset, title: str) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head (N, F) and the logits (N, num_classes). `title` describes the progress bar."""
    network, transform = as_timm_model(model).eval(), build_transform(data_config, train=False)
    features, logits = [], []
    with torch.no_grad(), tqdm(total=len(images), desc=title, unit="image", leave=False, disable=None) as bar:
        for batch in images.iter(16):
            maps = network.forward_features(torch.stack([transform(image) for image in batch["image"]]))
            features.append(network.forward_head(maps, pre_logits=True).flatten(1))
            logits.append(network.forward_head(maps))
            bar.update(len(maps))
    return torch.cat(features), torch.cat(logits)


def class_mean_accuracy(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Assign each of the test features (M, F) to the nearest class mean of `features` (N, F). Return the accuracy."""
    centre = features.mean(0)
    means = torch.stack([(features[labels == label] - centre).mean(0) for label in labels.unique()])
    similarity = F.normalize(test_features - centre) @ F.normalize(means).T
    return (labels.unique()[similarity.argmax(1)] == test_labels).float().mean().item()


def head_outputs(model: nn.Module, names: list[str]) -> list[int] | None:
    """Return the index of the output for each name in `names`, or None if a name is not a known class of the head.

    If the model has no class names, timm infers from the number of classes whether the model was trained on ImageNet.
    For an ImageNet model, a name is a WordNet id (`n02123045`) or a word (`tabby`).

    Example:
        >>> head_outputs(load_backbone("mobilenetv2_035"), ["n02123045", "Tabby", "daisy"])
        [281, 281, 985]
    """
    known = class_names(model)
    if known is not None:
        outputs = {_key(name): index for index, name in enumerate(known)}
    else:
        subset = infer_imagenet_subset(model)
        if subset is None:
            return None
        info, outputs = ImageNetInfo(subset), {}
        for index in range(info.num_classes()):
            words = [info.index_to_label_name(index), *info.index_to_description(index).split(",")]
            for word in words:
                outputs.setdefault(_key(word), index)
    found = [outputs.get(_key(name)) for name in names]
    return None if None in found else [index for index in found if index is not None]


def _key(name: str) -> str:
    # Folders often have an underscore in place of a space.
    return name.strip().lower().replace("_", " ")
