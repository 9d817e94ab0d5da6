"""A folded norm is whatever stands in its slot, while both layers allow it and nobody looks between them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_edge import ConvLoraConfig
from peft_edge.lean import prepare_model_for_lean_training
from peft_edge.lean.inplace_norm import ModuleRef, is_overwritable


@pytest.fixture
def folded(chain: nn.Module) -> nn.Module:
    """The chain, folded."""
    return prepare_model_for_lean_training(chain.double(), inplace_norm=True)


@pytest.fixture
def images() -> Tensor:
    """What the chain takes."""
    return torch.randn(2, 3, 9, 9, dtype=torch.float64)


def plain(model: nn.Module) -> nn.Module:
    """A copy that is not lean."""
    from peft_edge.lean import undo_lean_training

    return undo_lean_training(copy.deepcopy(model))


def test_a_slot_follows_what_is_put_into_it(chain: nn.Module) -> None:
    slot = ModuleRef(chain, "1")
    chain[1] = replacement = nn.Identity()

    assert slot.module is replacement


def test_the_norm_writes_over_what_it_is_handed(folded: nn.Module, images: Tensor) -> None:
    expected = plain(folded)[:2](images)
    y = folded[0](images)

    assert folded[1](y) is y
    assert torch.equal(y, expected)


def test_a_norm_leaves_alone_what_it_is_not_handed(folded: nn.Module, images: Tensor) -> None:
    y = folded[0](images)
    copied = y.clone()
    stranger = copy.deepcopy(folded[1])

    assert torch.equal(folded[1](copied), stranger(y))
    assert torch.equal(copied, y)


def test_what_was_changed_or_is_normalised_already_is_not_handed_over(folded: nn.Module, images: Tensor) -> None:
    changed, y = folded[0](images).add_(1.0), folded[0](images)
    normalised = folded[1](y)

    assert not is_overwritable(changed, folded[1])
    assert not is_overwritable(normalised, folded[1])


def test_a_norm_that_changes_or_goes_by_the_batch_writes_nothing_over(folded: nn.Module, images: Tensor) -> None:
    for change in (lambda norm: norm.train(), lambda norm: norm.eval().requires_grad_(True)):
        change(folded[1])
        y = folded[0](images)
        before = y.clone()

        assert folded[1](y) is not y
        assert torch.equal(y, before)


def test_there_is_nothing_to_hand_over_without_a_partner(chain: nn.Module, images: Tensor) -> None:
    prepare_model_for_lean_training(chain.double())
    assert not is_overwritable(chain[0](images), chain[1])
    prepare_model_for_lean_training(chain, inplace_norm=True)
    assert is_overwritable(chain[0](images), chain[1])
    with torch.inference_mode():
        assert not is_overwritable(chain[0](images), chain[1])
        chain(images)


def test_a_trained_convolution_hands_over_too(folded: nn.Module, images: Tensor) -> None:
    unfolded = plain(folded)
    for model in (folded, unfolded):
        model[0].requires_grad_(True)
        model(images).square().sum().backward()

    assert is_overwritable(folded[0](images), folded[1])
    assert torch.equal(folded[0].weight.grad, unfolded[0].weight.grad)


def test_a_mark_is_asked_for_once_and_is_plain_data(folded: nn.Module, images: Tensor) -> None:
    y, other = folded[0](images), folded[0](images)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)

    torch.testing.assert_close(torch.load(file), y)
    assert is_overwritable(y, folded[1])
    assert not is_overwritable(y, folded[1])
    assert not is_overwritable(other, folded[2])
    assert not is_overwritable(other, folded[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_that_begins_at_the_norm_keeps_what_it_began_with(
    folded: nn.Module, images: Tensor, use_reentrant: bool
) -> None:
    gradients = []
    for model in (folded, plain(folded)):
        x = images.clone().requires_grad_()
        y = checkpoint(model[1:], model[0](x), use_reentrant=use_reentrant)
        y.square().sum().backward()
        gradients.append(x.grad)

    torch.testing.assert_close(*gradients)


def test_a_hook_on_what_ends_in_the_convolution_sees_its_output(images: Tensor) -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)), nn.Sequential(nn.BatchNorm2d(4)))
    prepare_model_for_lean_training(model.double().eval().requires_grad_(False), inplace_norm=True)
    assert is_overwritable(model[0](images), model[1][0])

    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)

    assert torch.equal(seen[0], model[0][1](images))


def test_a_norm_that_is_gone_is_handed_nothing(folded: nn.Module, images: Tensor) -> None:
    del folded[1:]

    assert torch.equal(folded(images), folded[0](images))


def test_transformed_tensors_are_not_handed_over(folded: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(folded)(images[:, None])[:, 0], plain(folded)(images))


def test_views_are_not_handed_over() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval().requires_grad_(False)
    model.pretrained_cfg = {"input_size": (3, 8)}
    prepare_model_for_lean_training(model, inplace_norm=True)
    x = torch.randn(2, 3, 8)

    assert is_overwritable(model[0](x), model[1])
    assert not is_overwritable(model[0](x[0]), model[1])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "observe",
    [
        lambda layer: layer.register_forward_hook(lambda layer, args, y: 2 * y if isinstance(layer, nn.Conv2d) else y),
        lambda layer: layer.register_forward_pre_hook(lambda layer, args: None),
        lambda layer: setattr(layer, "forward", lambda x, forward=layer.forward: forward(x) + 1),
    ],
    ids=["hook", "pre-hook", "patched forward"],
)
def test_nobody_sees_the_difference_between_the_two(
    folded: nn.Module, images: Tensor, index: int, observe: Callable[[nn.Module], object]
) -> None:
    unfolded = plain(folded)
    for model in (folded, unfolded):
        observe(model[index])

    torch.testing.assert_close(folded(images), unfolded(images))


def test_statistics_that_change_show_in_the_next_pass(folded: nn.Module, images: Tensor) -> None:
    before = folded(images)

    folded[1].running_mean.add_(1.0)

    assert not torch.allclose(folded(images), before)
    torch.testing.assert_close(folded(images), plain(folded)(images))


def test_a_copy_of_one_layer_is_that_layer(folded: nn.Module, images: Tensor) -> None:
    expected = plain(folded)[0](images)
    file = io.BytesIO()
    torch.save(folded[0], file)
    file.seek(0)

    torch.testing.assert_close(copy.deepcopy(folded[0])(images), expected)
    torch.testing.assert_close(torch.load(file, weights_only=False)(images), expected)
    torch.testing.assert_close(copy.deepcopy(folded)(images), folded(images))


def test_a_copy_of_one_activation_leaves_the_rest_of_the_model_behind(folded: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(folded[2], file)

    assert folded[2].consumers[0].module is folded[3]
    assert copy.deepcopy(folded[2]).consumers[0].module is None
    copied = copy.deepcopy(folded)
    assert copied[2].consumers[0].module is copied[3]
    assert b"BatchNorm" not in file.getvalue()


@pytest.mark.parametrize("saved", ["0", "1"])
def test_layers_that_peft_copies_are_the_copies(folded: nn.Module, images: Tensor, saved: str) -> None:
    model = get_peft_model(folded, LoraConfig(target_modules=["3"], modules_to_save=[saved])).eval()
    copied = model.base_model.model[int(saved)].modules_to_save["default"]
    with torch.no_grad():
        copied.weight.mul_(1.5)
    model.requires_grad_(False)

    torch.testing.assert_close(model(images), plain(model)(images))


def test_a_slice_that_is_adapted_is_what_it_is_without_folding_or_refused(folded: nn.Module, images: Tensor) -> None:
    part = nn.Sequential(*folded[:3])
    model = get_peft_model(part, ConvLoraConfig(target_modules="all-conv", norm="stats", init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model[1].states["default"].running_mean.add_(1.0)

    torch.testing.assert_close(model.eval()(images), plain(model)(images))


def test_mixed_batches_with_norms_outside_of_the_adapter(folded: nn.Module, images: Tensor) -> None:
    config = ConvLoraConfig(target_modules="all-conv", exclude_modules=["1"], init_lora_weights=False, norm="frozen")
    model: PeftModel = get_peft_model(folded, config).eval()

    found = model(images, adapter_names=["default", "__base__"])

    torch.testing.assert_close(found, plain(model)(images, adapter_names=["default", "__base__"]))
    torch.testing.assert_close(found[0], model(images)[0])


class _OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y if self.training else self.norm(y)


def test_what_happens_in_training_only_is_seen() -> None:
    model = _OnlyInTraining().requires_grad_(False)

    prepare_model_for_lean_training(model, inplace_norm=True)

    assert not is_overwritable(model.eval().conv(torch.randn(2, 3, 5, 5)), model.norm)
