"""Check imported weights on labelled photographs, without training."""

from __future__ import annotations

import math
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

MEAN_SIZE, TEST_SIZE = 20, 200  # limits: training images per class (on average), and test images in total
SIGNIFICANCE = 0.05
IMPORTED, RANDOM = "as imported", "random weights"
NORMALISATIONS = {
    "mean and std of ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "mean and std 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}


@dataclass(frozen=True)
class WeightProbe:
    """The result of `probe_weights`. It says which of N test images a network classifies correctly.

    Attributes:
        class_mean: A dict from the name of a setting to a boolean tensor (N,), which is True for each image that
            nearest-class-mean classification assigns to the right class. The settings are `IMPORTED` (the given weights
            and preprocessing), `RANDOM` (random weights), and the given weights with other input normalisations (keys
            of `NORMALISATIONS`).
        head: A boolean tensor (N,), which is True for each image that the network's own head classifies correctly. None
            if the class names of the head are unknown, or if a class of the images is not among them.
    """

    class_mean: Mapping[str, Tensor]
    head: Tensor | None

    @property
    def warnings(self) -> list[str]:
        """Messages about probable mistakes in the weights or their preprocessing. Empty if nothing is suspicious."""
        imported, found = self.class_mean[IMPORTED], []
        if not is_better(imported, self.class_mean[RANDOM]):
            found.append(
                "Warning: the features are not significantly better than those of random weights. The tensors may be "
                "matched wrongly, the weights may belong to another model, or there are too few images for this check"
            )
        for name, (mean, std) in NORMALISATIONS.items():
            if name in self.class_mean and is_better(self.class_mean[name], imported):
                values = " ".join(["--mean", *map(str, mean), "--std", *map(str, std)])
                found.append(f"Warning: {name} are significantly better. Were the weights trained with {values}?")
        return found

    def __str__(self) -> str:
        rows = [("", "nearest class mean", "head")]
        for name, correct in self.class_mean.items():
            head = "-" if self.head is None or name != IMPORTED else _accuracy(self.head)
            rows.append((name, _accuracy(correct), head))
        return "\n".join([text_table(rows), *(self.warnings or ["The weights and the preprocessing seem right."])])


def _accuracy(correct: Tensor) -> str:
    return f"{correct.float().mean().item():.3f} ({int(correct.sum())} of {len(correct)})"


def is_better(correct: Tensor, other: Tensor) -> bool:
    """Return whether one classifier is significantly better than another classifier on the same N images.

    The boolean tensors `correct` and `other`, both (N,), are True for the images that the first and the second
    classifier, respectively, classify correctly. The function computes the exact one-sided sign test (McNemar 1947) at
    the level of 5 %. The test uses only images on which exactly one classifier is correct. If the two classifiers were
    equally good, each would be correct on half of these images on average.

    >>> is_better(torch.tensor([True] * 5), torch.tensor([False] * 5))  # by chance, this has the probability 1 / 32
    True
    >>> is_better(torch.tensor([True] * 5), torch.tensor([False] * 4 + [True]))
    False
    """
    wins, losses = int((correct & ~other).sum()), int((other & ~correct).sum())
    differing = wins + losses
    return sum(math.comb(differing, count) for count in range(wins, differing + 1)) < SIGNIFICANCE * 2**differing


def probe_weights(model: nn.Module, folder: str) -> WeightProbe:
    """Measure how well the features of a timm model separate the classes of labelled images, without training.

    Each test image gets the class whose mean feature has the largest cosine similarity with the image's feature, as in
    nearest-class-mean classification (Mensink et al. 2013). Features are the inputs of the head, minus their mean over
    the training images. The images are classified again with other input normalisations, and with random weights. If
    another normalisation gives significantly better results, or if random weights do not give significantly worse
    results, the weights of `model` or their preprocessing are probably wrong.

    Args:
        model: A timm model. It is not changed.
        folder: A folder with one subfolder for each class, or a Hugging Face dataset. Class means are computed on the
            training images of this data, and accuracies on its test images.

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
    class_mean, head = {}, None
    for name, (network, data_config) in settings.items():
        features, _ = _predict(network, data_config, train, f"{name}, training images")
        found, logits = _predict(network, data_config, test, f"{name}, test images")
        class_mean[name] = predict_by_class_mean(features, torch.tensor(train["label"][:]), found) == truth
        outputs = head_outputs(model, domain.class_names) if name == IMPORTED else None
        if outputs is not None:
            head = logits.argmax(1) == torch.tensor(outputs)[truth]
    model.train(was_training)
    return WeightProbe(class_mean, head)


def _predict(model: nn.Module, data_config: Mapping[str, Any], images: Dataset, title: str) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head (N, F) and the logits (N, num_classes). `title` is the text of the progress bar."""
    network, transform = as_timm_model(model).eval(), build_transform(data_config, train=False)
    features, logits = [], []
    with torch.no_grad(), tqdm(total=len(images), desc=title, unit="image", leave=False, disable=None) as bar:
        for batch in images.iter(16):
            maps = network.forward_features(torch.stack([transform(image) for image in batch["image"]]))
            features.append(network.forward_head(maps, pre_logits=True).flatten(1))
            logits.append(network.forward_head(maps))
            bar.update(len(maps))
    return torch.cat(features), torch.cat(logits)


def predict_by_class_mean(features: Tensor, labels: Tensor, test_features: Tensor) -> Tensor:
    """Return the predicted labels (M,) for `test_features` (M, F).

    The predicted label of a test feature is the label of the class whose mean feature has the largest cosine similarity
    with the test feature. The class means are computed from `features` (N, F) and their `labels` (N,). Before the
    comparison, the mean over all `features` is subtracted from the class means and from the test features.
    """
    centre = features.mean(0)
    means = torch.stack([(features[labels == label] - centre).mean(0) for label in labels.unique()])
    similarity = F.normalize(test_features - centre) @ F.normalize(means).T
    return labels.unique()[similarity.argmax(1)]


def head_outputs(model: nn.Module, names: list[str]) -> list[int] | None:
    """Return the index of the model's output for each class name in `names`.

    Return None if the model has no output for one of the names. If the model has no class names, timm infers from the
    number of classes whether the model was trained on ImageNet. If so, the names of the outputs are WordNet ids
    (`n02123045`) and English words (`tabby`). If not, return None.

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
    # The name of a folder often has an underscore in place of a space.
    return name.strip().lower().replace("_", " ")
