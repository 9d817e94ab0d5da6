"""Test that a norm overwrites the output of its convolution only if nothing else sees that output."""

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
def lean(chain: nn.Module) -> nn.Module:
    """Return the network of the fixture `chain`, prepared with `inplace_norm=True`."""
    return prepare_model_for_lean_training(chain.double(), inplace_norm=True)


@pytest.fixture
def images() -> Tensor:
    """Return random inputs for the network of the fixture `chain`."""
    return torch.randn(2, 3, 9, 9, dtype=torch.float64)


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without lean training."""
    from peft_edge.lean import undo_lean_training

    return undo_lean_training(copy.deepcopy(model))


def test_module_ref_follows_a_replaced_module(chain: nn.Module) -> None:
    ref = ModuleRef(chain, "1")
    chain[1] = replacement = nn.Identity()

    assert ref.module is replacement


def test_norm_overwrites_the_output_of_its_convolution(lean: nn.Module, images: Tensor) -> None:
    expected = plain(lean)[:2](images)
    y = lean[0](images)

    assert lean[1](y) is y
    assert torch.equal(y, expected)


def test_norm_does_not_overwrite_an_unmarked_tensor(lean: nn.Module, images: Tensor) -> None:
    y = lean[0](images)
    copied = y.clone()
    stranger = copy.deepcopy(lean[1])

    assert torch.equal(lean[1](copied), stranger(y))
    assert torch.equal(copied, y)


def test_changed_or_normalised_output_is_not_overwritable(lean: nn.Module, images: Tensor) -> None:
    changed, y = lean[0](images).add_(1.0), lean[0](images)
    normalised = lean[1](y)

    assert not is_overwritable(changed, lean[1])
    assert not is_overwritable(normalised, lean[1])


def test_trained_norm_and_norm_in_training_mode_overwrite_nothing(lean: nn.Module, images: Tensor) -> None:
    for change in (lambda norm: norm.train(), lambda norm: norm.eval().requires_grad_(True)):
        change(lean[1])
        y = lean[0](images)
        before = y.clone()

        assert lean[1](y) is not y
        assert torch.equal(y, before)


def test_output_is_overwritable_only_with_a_pair_and_outside_inference_mode(chain: nn.Module, images: Tensor) -> None:
    prepare_model_for_lean_training(chain.double())
    assert not is_overwritable(chain[0](images), chain[1])
    prepare_model_for_lean_training(chain, inplace_norm=True)
    assert is_overwritable(chain[0](images), chain[1])
    with torch.inference_mode():
        assert not is_overwritable(chain[0](images), chain[1])
        chain(images)


def test_output_of_a_trained_convolution_is_overwritable(lean: nn.Module, images: Tensor) -> None:
    plain_model = plain(lean)
    for model in (lean, plain_model):
        model[0].requires_grad_(True)
        model(images).square().sum().backward()

    assert is_overwritable(lean[0](images), lean[1])
    assert torch.equal(lean[0].weight.grad, plain_model[0].weight.grad)


def test_mark_is_valid_once_and_can_be_pickled(lean: nn.Module, images: Tensor) -> None:
    y, other = lean[0](images), lean[0](images)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)

    torch.testing.assert_close(torch.load(file), y)
    assert is_overwritable(y, lean[1])
    assert not is_overwritable(y, lean[1])
    assert not is_overwritable(other, lean[2])
    assert not is_overwritable(other, lean[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_that_begins_at_the_norm_keeps_its_input(
    lean: nn.Module, images: Tensor, use_reentrant: bool
) -> None:
    gradients = []
    for model in (lean, plain(lean)):
        x = images.clone().requires_grad_()
        y = checkpoint(model[1:], model[0](x), use_reentrant=use_reentrant)
        y.square().sum().backward()
        gradients.append(x.grad)

    torch.testing.assert_close(*gradients)


def test_hook_on_a_module_that_ends_in_the_convolution_sees_its_output(images: Tensor) -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)), nn.Sequential(nn.BatchNorm2d(4)))
    prepare_model_for_lean_training(model.double().eval().requires_grad_(False), inplace_norm=True)
    assert is_overwritable(model[0](images), model[1][0])

    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)

    assert torch.equal(seen[0], model[0][1](images))


def test_removed_norm_overwrites_nothing(lean: nn.Module, images: Tensor) -> None:
    del lean[1:]

    assert torch.equal(lean(images), lean[0](images))


def test_vmapped_outputs_are_not_overwritable(lean: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lean)(images[:, None])[:, 0], plain(lean)(images))


def test_views_are_not_overwritable() -> None:
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
def test_hooks_and_patched_forwards_see_the_plain_tensors(
    lean: nn.Module, images: Tensor, index: int, observe: Callable[[nn.Module], object]
) -> None:
    plain_model = plain(lean)
    for model in (lean, plain_model):
        observe(model[index])

    torch.testing.assert_close(lean(images), plain_model(images))


def test_changed_statistics_take_effect_in_the_next_pass(lean: nn.Module, images: Tensor) -> None:
    before = lean(images)

    lean[1].running_mean.add_(1.0)

    assert not torch.allclose(lean(images), before)
    torch.testing.assert_close(lean(images), plain(lean)(images))


def test_copied_and_pickled_layers_compute_the_same(lean: nn.Module, images: Tensor) -> None:
    expected = plain(lean)[0](images)
    file = io.BytesIO()
    torch.save(lean[0], file)
    file.seek(0)

    torch.testing.assert_close(copy.deepcopy(lean[0])(images), expected)
    torch.testing.assert_close(torch.load(file, weights_only=False)(images), expected)
    torch.testing.assert_close(copy.deepcopy(lean)(images), lean(images))


def test_copied_activation_does_not_copy_the_model(lean: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(lean[2], file)

    assert lean[2].consumers[0].module is lean[3]
    assert copy.deepcopy(lean[2]).consumers[0].module is None
    copied = copy.deepcopy(lean)
    assert copied[2].consumers[0].module is copied[3]
    assert b"BatchNorm" not in file.getvalue()


@pytest.mark.parametrize("saved", ["0", "1"])
def test_modules_to_save_runs_the_saved_copy(lean: nn.Module, images: Tensor, saved: str) -> None:
    model = get_peft_model(lean, LoraConfig(target_modules=["3"], modules_to_save=[saved])).eval()
    copied = model.base_model.model[int(saved)].modules_to_save["default"]
    with torch.no_grad():
        copied.weight.mul_(1.5)
    model.requires_grad_(False)

    torch.testing.assert_close(model(images), plain(model)(images))


def test_adapted_slice_of_a_lean_model_computes_the_same(lean: nn.Module, images: Tensor) -> None:
    part = nn.Sequential(*lean[:3])
    model = get_peft_model(part, ConvLoraConfig(target_modules="all-conv", norm="stats", init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model[1].states["default"].running_mean.add_(1.0)

    torch.testing.assert_close(model.eval()(images), plain(model)(images))


def test_mixed_batches_with_norms_outside_the_adapter_compute_the_same(lean: nn.Module, images: Tensor) -> None:
    config = ConvLoraConfig(target_modules="all-conv", exclude_modules=["1"], init_lora_weights=False, norm="frozen")
    with pytest.warns(UserWarning, match=r"statistics of \['1'\] are not part of the adapter"):
        model: PeftModel = get_peft_model(lean, config).eval()

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


def test_use_of_the_output_in_training_mode_prevents_overwriting() -> None:
    model = _OnlyInTraining().requires_grad_(False)

    prepare_model_for_lean_training(model, inplace_norm=True)

    assert not is_overwritable(model.eval().conv(torch.randn(2, 3, 5, 5)), model.norm)


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.chunk(2, 1)[0].square(),
        lambda y: torch.var_mean(y, (2, 3), keepdim=True)[0],
        lambda y: y.topk(2, dim=1).values.sum(1, keepdim=True),
    ],
    ids=["chunk", "var_mean", "topk"],
)
def test_function_with_several_results_prevents_overwriting(read: Callable[[Tensor], Tensor]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).requires_grad_(False).eval()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y).sum(1, keepdim=True) + read(y)

    model, images = Block(), torch.randn(2, 3, 5, 5)
    model.norm.running_var.fill_(4.0)
    expected = model(images)

    prepare_model_for_lean_training(model, inplace_norm=True)

    assert torch.equal(model(images), expected)


def test_output_that_retains_its_gradient_is_not_overwritten(lean: nn.Module, images: Tensor) -> None:
    conv, norm = lean[0], lean[1]
    y = conv(images.requires_grad_())
    y.retain_grad()

    assert not is_overwritable(y, norm)
