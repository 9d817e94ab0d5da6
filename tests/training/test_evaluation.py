from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from peft_edge.backbones import load_backbone
from peft_edge.training.adaptation import merged_copy
from peft_edge.training.evaluation import Predictions, check_saved, eval_logits, kernel_changes, predict, results
from peft_edge.tuners.conv_adapter import ConvAdapterConfig


def test_every_image_is_predicted_once() -> None:
    """Ten images in batches of four, of which the identity classifies seven correctly."""
    scores = torch.eye(10)
    labels = torch.arange(10)
    labels[:3] = 9
    rows = [{"pixel_values": score, "labels": label} for score, label in zip(scores, labels, strict=True)]
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare_data_loader(DataLoader(rows, batch_size=4))
    found = predict(nn.Identity(), batches, accelerator, stage="testing")
    assert (found.predictions, found.references) == (list(range(10)), labels.tolist())
    assert found.accuracy == pytest.approx(0.7)


def test_the_same_model_differs_by_nothing() -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    assert check_saved(model, merged_copy(model), images, eval_logits(model, images)) == {
        "reloaded_max_logit_difference": 0.0
    }


def test_an_adapter_that_cannot_be_merged_is_checked_unmerged() -> None:
    config = ConvAdapterConfig(norm="stats", target_modules="dense", activation="relu")
    model, images = get_peft_model(load_backbone("mobilenetv3_small_050"), config), torch.randn(2, 3, 32, 32)
    assert check_saved(model, merged_copy(model), images, eval_logits(model, images)) == {
        "reloaded_max_logit_difference": 0.0
    }


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_reloaded_model_that_differs_is_reported(change: float) -> None:
    model, images = load_backbone("mobilenetv3_small_050", num_classes=3), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="the reloaded model is not the one that was trained"):
        check_saved(model, model, images, eval_logits(model, images) + change)


def predictions(right: int, wrong: int) -> Predictions:
    return Predictions([1] * right + [0] * wrong, [1] * (right + wrong))


def test_results_of_one_target() -> None:
    before, after = [predictions(8, 2), predictions(1, 4)], [predictions(6, 4), predictions(4, 1)]
    assert results([before, after]) == {
        "test accuracy": 0.8,
        "source test accuracy": 0.6,
        "test accuracy without update": 0.2,
        "source test accuracy without update": 0.8,
        "retention": pytest.approx(0.75),
        "forgetting": pytest.approx(0.2),
        "harmonic mean": pytest.approx(2 * 0.8 * 0.6 / 1.4),
    }


def test_nothing_is_forgotten_without_an_update() -> None:
    found = results([[predictions(8, 2), predictions(1, 4)]])
    assert (found["retention"], found["forgetting"]) == (1, 0)


def test_results_of_increments_are_pooled_and_forgetting_is_relative_to_the_best() -> None:
    """The first target is learned to 1.0 and falls to 0.5; the source falls from 1.0 to 0.8 and to 0.7."""
    found = results(
        [
            [predictions(10, 0), predictions(0, 4), predictions(0, 12)],
            [predictions(8, 2), predictions(4, 0), predictions(0, 12)],
            [predictions(7, 3), predictions(2, 2), predictions(9, 3)],
        ]
    )
    assert found["test accuracy"] == 11 / 16
    assert found["forgetting"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["accuracies"] == [[1.0], [0.8, 1.0], [0.7, 0.5, 0.75]]


@pytest.fixture
def source() -> nn.Module:
    """Return a network with one convolution of each kind. All weights are 1."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
    )
    for conv in model:
        nn.init.ones_(conv.weight)
    return model


def test_only_changed_kernels_are_listed(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[1].weight.data += 1
    updated[0].bias.data += 1
    assert {name: change.kind for name, change in kernel_changes(source, updated).items()} == {"1": "depthwise"}


def test_each_kernel_has_the_kind_of_its_layer(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    for conv in updated:
        conv.weight.data += 1
    kinds = [change.kind for change in kernel_changes(source, updated).values()]
    assert kinds == ["pointwise", "depthwise", "dense", "grouped"]


def test_a_scaled_kernel_changes_in_one_direction(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[2].weight.data *= 1.25
    change = kernel_changes(source, updated)["2"]
    assert (change.relative_norm, change.stable_rank) == (0.25, 1.0)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_orthogonal_columns_of_equal_norm_each_add_one_to_the_stable_rank(source: nn.Module, columns: int) -> None:
    updated = copy.deepcopy(source)
    updated[0].weight.data[:, :columns, 0, 0] += torch.eye(8)[:, :columns]
    change = kernel_changes(source, updated)["0"]
    assert change.stable_rank == columns
    assert change.relative_norm == pytest.approx((columns / 32) ** 0.5, rel=1e-3)


def test_the_stable_rank_is_a_ratio_of_squared_singular_values(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[2].weight.data += torch.randn_like(updated[2].weight)
    values = torch.linalg.svdvals((updated[2].weight - source[2].weight).double().flatten(1)) ** 2
    assert kernel_changes(source, updated)["2"].stable_rank == pytest.approx(
        (values.sum() / values[0]).item(), rel=1e-3
    )
