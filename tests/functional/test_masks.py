"""Masks against indexing."""

from __future__ import annotations

import pytest
import torch

from peft_edge.functional import masks
from peft_edge.functional.masks import is_dense, make_mask, mask_gradient

SIZES = [(1,), (7,), (8,), (3, 5, 7, 9), (2, 16, 130, 127)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["bit", "byte"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_stays_where_the_mask_is_set(
    size: tuple[int, ...], packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_CACHED_ELEMENTS", 1000)
    x, gradient = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)

    mask = make_mask(x, lambda part: part > 0.3, packed=packed)
    result = mask_gradient(gradient, mask, torch.empty_like(gradient))

    assert mask.dtype == torch.uint8
    assert mask.numel() == (-(-x.numel() // 8) if packed else x.numel())
    assert torch.equal(result, torch.where(x > 0.3, gradient, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("packed", [True, False], ids=["bit", "byte"])
def test_the_mask_is_in_the_order_of_the_memory(packed: bool) -> None:
    x = torch.randn(2, 5, 6, 3).to(memory_format=torch.channels_last)
    gradient = torch.randn(2, 5, 6, 3).to(memory_format=torch.channels_last)
    expected = torch.where(x > 0, gradient, torch.zeros(()))

    mask_gradient(gradient, make_mask(x, lambda part: part > 0, packed=packed), out=gradient)

    assert torch.equal(gradient, expected)


def test_where_nothing_passes_an_infinite_gradient_ends() -> None:
    gradient = torch.tensor([float("inf"), float("nan"), float("inf")])
    mask = make_mask(torch.tensor([1.0, -1.0, -1.0]), lambda part: part > 0, packed=True)

    assert mask_gradient(gradient, mask, torch.empty(3)).tolist() == [float("inf"), 0.0, 0.0]


def test_dense_is_what_leaves_no_gaps_in_the_memory() -> None:
    x = torch.zeros(2, 4, 6, 8)

    assert is_dense(x)
    assert is_dense(x.to(memory_format=torch.channels_last))
    assert is_dense(torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d))
    assert is_dense(torch.zeros(()))
    assert not is_dense(x[:, :2])
    assert not is_dense(x.permute(1, 0, 2, 3))
    assert not is_dense(torch.zeros(1).expand(4))
