from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_edge.training.changes import kernel_changes


@pytest.fixture
def source() -> nn.Module:
    """A kernel of each kind, all ones."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
    )
    for conv in model:
        nn.init.ones_(conv.weight)
    return model


def test_only_kernels_that_have_changed_are_named(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[1].weight.data += 1
    updated[0].bias.data += 1
    assert {name: change.kind for name, change in kernel_changes(source, updated).items()} == {"1": "depthwise"}


def test_kinds_are_those_of_the_layers(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    for conv in updated:
        conv.weight.data += 1
    kinds = [change.kind for change in kernel_changes(source, updated).values()]
    assert kinds == ["pointwise", "depthwise", "dense", "grouped"]


def test_a_multiple_goes_in_one_direction(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[2].weight.data *= 1.25
    change = kernel_changes(source, updated)["2"]
    assert (change.relative_norm, change.stable_rank) == (0.25, 1.0)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_orthogonal_columns_of_one_length_count_in_full(source: nn.Module, columns: int) -> None:
    updated = copy.deepcopy(source)
    updated[0].weight.data[:, :columns, 0, 0] += torch.eye(8)[:, :columns]
    change = kernel_changes(source, updated)["0"]
    assert change.stable_rank == columns
    assert change.relative_norm == pytest.approx((columns / 32) ** 0.5, rel=1e-3)


def test_it_is_the_ratio_of_squared_singular_values(source: nn.Module) -> None:
    updated = copy.deepcopy(source)
    updated[2].weight.data += torch.randn_like(updated[2].weight)
    values = torch.linalg.svdvals((updated[2].weight - source[2].weight).double().flatten(1)) ** 2
    assert kernel_changes(source, updated)["2"].stable_rank == pytest.approx(
        (values.sum() / values[0]).item(), rel=1e-3
    )
