"""The check of imported weights on labelled photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from peft_edge.backbones import fingerprint, load_backbone, set_class_names, set_preprocessing
from peft_edge.training.probe import (
    IMPORTED,
    RANDOM,
    WeightProbe,
    head_outputs,
    is_better,
    predict_by_class_mean,
    probe_weights,
)

IMAGENET = "mean and std of ImageNet"


def test_nearest_class_mean_is_that_of_the_angles() -> None:
    # Two classes around (10, 0) and (0, 10). Their common mean is (5, 5), and only the angle to it counts.
    features = torch.tensor([[9.0, 0.0], [11.0, 0.0], [0.0, 9.0], [0.0, 11.0]])
    labels = torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[6.0, 5.0], [500.0, 5.0], [5.0, 5.1], [5.0, 5.1]])
    assert predict_by_class_mean(features, labels, test).tolist() == [0, 0, 1, 1]


def test_classes_of_the_head_are_found_by_name() -> None:
    model = load_backbone("test_efficientnet")
    assert head_outputs(model, ["daisy", "n02123045", "Tabby", "lakeside"]) == [985, 281, 281, 975]
    assert head_outputs(model, ["tabby_cat", "bell_cote"]) == [281, 442]
    assert head_outputs(model, ["daisy", "guitar"]) is None
    own = load_backbone("test_efficientnet", 3)
    assert head_outputs(own, ["daisy"]) is None
    set_class_names(own, ["Cat", "dog", "owl"])
    assert head_outputs(own, ["owl", "cat"]) == [2, 0]
    set_class_names(own, ["polar_bear", "Grey wolf", "cat"])
    assert head_outputs(own, ["Polar bear", "grey_wolf"]) == [0, 1]


def folder_of_colours(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_probe_of_separable_classes(tmp_path: Path) -> None:
    model = load_backbone("test_efficientnet", 3)
    set_preprocessing(model, mean=0.5, std=0.5, image_size=32)
    set_class_names(model, ["owl", "cat", "dog"])
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # predicts owls only
    before = fingerprint(model)
    found = probe_weights(model, str(folder_of_colours(tmp_path)))
    assert found.class_mean.keys() == {IMPORTED, IMAGENET, RANDOM}
    assert all(correct.all() for correct in found.class_mean.values())
    assert found.head is not None
    assert found.head.float().mean() == pytest.approx(1 / 3, abs=0.1)
    assert fingerprint(model) == before
    assert model.training


def first(correct: int, images: int) -> torch.Tensor:
    """Return a boolean tensor for `images` images, in which only the first `correct` values are True."""
    return torch.arange(images) < correct


@pytest.mark.parametrize("differing", range(12))
def test_significance_is_that_of_the_binomial_distribution(differing: int) -> None:
    for wins in range(differing + 1):
        correct = torch.cat([first(wins, differing), torch.ones(7, dtype=torch.bool)])
        other = torch.cat([~first(wins, differing), torch.ones(7, dtype=torch.bool)])
        expected = bool(differing) and binomtest(wins, differing, alternative="greater").pvalue < 0.05
        assert is_better(correct, other) == expected


@pytest.mark.parametrize(
    ("correct", "images", "warnings"),
    [
        ({IMPORTED: 180, IMAGENET: 182, RANDOM: 80}, 200, []),
        ({IMPORTED: 15, IMAGENET: 16, RANDOM: 8}, 16, []),  # one image is no evidence
        ({IMPORTED: 84, RANDOM: 80}, 200, ["not significantly better than those of random weights"]),
        ({IMPORTED: 180, IMAGENET: 190, RANDOM: 80}, 200, ["--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"]),
    ],
)
def test_doubtful_weights_are_said(correct: dict[str, int], images: int, warnings: list[str]) -> None:
    found = WeightProbe({name: first(count, images) for name, count in correct.items()}, first(3, images))
    assert len(found.warnings) == len(warnings)
    assert all(text in warning for text, warning in zip(warnings, found.warnings, strict=True))
    header, row, *_, last = str(found).splitlines()
    assert last == (found.warnings[-1] if warnings else "The weights and the preprocessing seem right.")
    assert header.split() == ["nearest", "class", "mean", "head"]
    expected = [f"{count / images:.3f} ({count} of {images})" for count in (correct[IMPORTED], 3)]
    assert row.split("as imported")[1].split() == " ".join(expected).split()
