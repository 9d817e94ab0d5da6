"""A folded norm is whatever stands in its slot, while both layers allow it."""

from __future__ import annotations

import torch
from torch import nn

from peft_edge.lean import prepare_model_for_lean_training
from peft_edge.lean.folding import Slot, folded_affine


def test_a_slot_follows_what_is_put_into_it(chain: nn.Module) -> None:
    slot = Slot(chain, "1")
    chain[1] = replacement = nn.Identity()

    assert slot.module is replacement


def test_the_affine_is_the_norm(chain: nn.Module) -> None:
    x = torch.randn(2, 8, 5, 5)
    expected = chain[1](x)
    prepare_model_for_lean_training(chain, fold_norm=True)

    scale, shift = folded_affine(chain[0])

    torch.testing.assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), expected)
    assert torch.equal(chain[1](x), x)


def test_there_is_none_without_a_partner_that_can(chain: nn.Module) -> None:
    assert folded_affine(chain[0]) is None
    prepare_model_for_lean_training(chain, fold_norm=True)
    assert folded_affine(chain[3]) is None

    chain[1].train()
    assert folded_affine(chain[0]) is None
    chain[1].eval()
    assert folded_affine(chain[0]) is not None
    chain[0].weight.requires_grad_(True)
    assert folded_affine(chain[0]) is None
    chain[0] = nn.Conv2d(3, 8, 3, padding=1)
    assert folded_affine(chain[1]) is None


def test_statistics_that_change_show_in_the_next_pass(chain: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 9)
    prepare_model_for_lean_training(chain, fold_norm=True)
    before = chain(x)

    chain[1].running_mean.add_(1.0)

    assert not torch.allclose(chain(x), before)
    folded = chain(x)
    prepare_model_for_lean_training(chain, fold_norm=False)
    torch.testing.assert_close(chain(x), folded)
