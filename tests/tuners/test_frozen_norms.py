"""The usual ways to freeze, convert and recalibrate norms, on adapted networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from timm.layers import BatchNormAct2d, convert_splitbn_model, convert_sync_batchnorm
from timm.utils import freeze, unfreeze
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from peft_edge import ConvLoraConfig, recalibrate
from peft_edge.tuners.norm import BatchNormLayer
from tests.tuners.support import lora_config

Config = Callable[..., PeftConfig]


@pytest.fixture
def bright(images: Tensor) -> Tensor:
    return 3 * images + 2


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_norms_in_eval_mode_are_frozen(config: Config, small: nn.Module, bright: Tensor, norm: str) -> None:
    model = get_peft_model(small, config(norm=norm)).train()
    model(bright)
    before = _statistics(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    output = model(bright)

    assert _equal(_statistics(model), before)
    torch.testing.assert_close(output, model.eval()(bright))
    model.train()(bright)
    assert not _equal(_statistics(model), before)


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_norms_that_do_not_track_statistics_keep_them_as_in_torch(config: Config, bright: Tensor, norm: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = get_peft_model(network, config(target_modules=["0"], norm=norm)).train()
    plain = copy.deepcopy(model).merge_and_unload().train()
    before = _statistics(model)
    for layer in (plain[1], network[1].get_base_layer()):
        layer.track_running_stats = False

    torch.testing.assert_close(model(bright), plain(bright))
    update_bn([bright], model)

    assert _equal(_statistics(model), before)
    torch.testing.assert_close(model.eval()(bright), plain.eval()(bright))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet10t"])
def test_freeze_of_timm_is_respected_and_undone(
    config: Config, backbone: str, bright: Tensor, *, is_first: bool
) -> None:
    model = timm.create_model(backbone, num_classes=3)
    names = ["bn1", "blocks.0" if "mobile" in backbone else "layer1"]
    if is_first:
        freeze(model, names)
    network = model
    model = get_peft_model(model, config(norm="stats")).train()
    model(bright)
    if not is_first:
        freeze(network, names)
    before, expected = _statistics(model), model.eval()(bright)

    model.train()(bright)

    frozen = [f"base_model.model.{name}." for name in names]
    after = _statistics(model)
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name.startswith(tuple(frozen)) or ".base_layer." in name)
    assert not torch.allclose(model.eval()(bright), expected)
    if not is_first:
        unfreeze(network, names)
        model.train()(bright)
        assert isinstance(network.bn1, BatchNormLayer)
        assert isinstance(network.bn1.base_layer, nn.BatchNorm2d)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet10t"])
def test_conversion_to_sync_batch_norm_keeps_activations(
    config: Config, backbone: str, bright: Tensor, convert: Callable[[nn.Module], nn.Module]
) -> None:
    model = get_peft_model(timm.create_model(backbone, num_classes=3), config(norm="affine")).train()
    model(bright)
    expected = copy.deepcopy(model)

    model = convert(model)

    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert type(model.base_model.model.bn1.base_layer) is not nn.SyncBatchNorm or backbone == "resnet10t"
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(bright), expected.train(mode)(bright))
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(model(bright), expected(bright))


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet10t"])
def test_network_converted_by_timm_is_adapted(config: Config, backbone: str, bright: Tensor) -> None:
    network = timm.create_model(backbone, num_classes=3)
    expected = copy.deepcopy(network).eval()(bright)

    model = get_peft_model(convert_sync_batchnorm(network), config())

    with model.eval().disable_adapter():
        torch.testing.assert_close(model(bright), expected)
    assert model.train()(bright).isfinite().all()


def test_conversion_to_another_layer_is_refused_by_name(config: Config) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config())

    with pytest.raises(ValueError, match="'1': SplitBatchNorm2d is not a plain batch normalisation"):
        convert_splitbn_model(model, 2)
    layer = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), config()).base_model.model[1]
    with pytest.raises(ValueError, match=r"'1' to BatchNorm2d.*same activation"):
        layer.add_module("base_layer", nn.BatchNorm2d(4))
    assert isinstance(layer.base_layer, BatchNormAct2d)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_of_torch_estimates_the_adapters_statistics(config: Config, momentum: float | None) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum))
    base = copy.deepcopy(network)
    model = get_peft_model(network, config(target_modules=["0"])).train()
    batches = [3 * torch.randn(8, 3, 8, 8) + scale for scale in range(3)]
    model(batches[0])
    plain = copy.deepcopy(model).unload()
    plain[0].weight.data = copy.deepcopy(model).merge_and_unload()[0].weight.data

    update_bn(batches, model)
    update_bn(batches, plain)

    torch.testing.assert_close(model.eval()(batches[0]), plain.eval()(batches[0]), atol=1e-5, rtol=1e-5)
    assert _equal(_statistics(network[1].base_layer), _statistics(base[1]))
    unloaded = model.unload()
    unloaded[1].reset_running_stats()
    assert torch.equal(unloaded[1].running_var, torch.ones(4))


@pytest.mark.parametrize("norm", ["frozen", "recalibrate"])
def test_update_bn_is_refused_where_nothing_updates_statistics(config: Config, norm: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[1].running_mean.normal_()
    model = get_peft_model(network, config(target_modules=["0"], norm=norm))
    before = _statistics(model)

    with pytest.raises(ValueError, match=r"layer '1'.*peft_edge.recalibrate"):
        update_bn([torch.randn(2, 3, 8, 8)], model)

    assert _equal(_statistics(model), before)


def test_recalibrate_leaves_every_module_in_its_mode(config: Config, tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(tiny_backbone, config(norm="stats")).train()
    for module in list(model.modules())[::3]:
        module.training = not module.training
    modes = [module.training for module in model.modules()]

    recalibrate(model, [images])

    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["recalibrate", "update_bn"])
def test_one_process_alone_estimates_statistics(config: Config, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config(target_modules=["0"]))
    batches = [torch.randn(8, 3, 8, 8) + 1]
    estimate = {"recalibrate": lambda: recalibrate(model, batches), "update_bn": lambda: update_bn(batches, model)}
    estimate[name]()
    expected = _statistics(model)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def wait(tensor: Tensor) -> None:
        raise AssertionError("the other process would have to take part")

    monkeypatch.setattr(dist, "all_reduce", wait)

    estimate[name]()

    assert _equal(_statistics(model), expected)
    with pytest.raises(AssertionError, match="other process"):
        recalibrate(model, batches, synchronise=True)
    with pytest.raises(AssertionError, match="other process"):
        model.train()(batches[0])


def test_refused_norm_is_saved_whole_as_advised(tmp_path: Path, config: Config) -> None:
    network = convert_splitbn_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2)
    base, x = copy.deepcopy(network), 3 * torch.randn(8, 3, 8, 8) + 2
    with pytest.raises(ValueError, match=r"exclude_modules=\['1'\].*modules_to_save=\['1'\]"):
        get_peft_model(network, config(target_modules=["0"]))
    model = get_peft_model(network, config(target_modules=["0"], modules_to_save=["1"])).train()
    for _ in range(5):
        model(x)
    expected = model.eval()(x)

    model.save_pretrained(tmp_path)

    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(x), expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_that_are_not_saved_are_warned_of(config: Config, norm: nn.Module) -> None:
    excluded = {"exclude_modules": ["1"]} if isinstance(norm, nn.BatchNorm2d) else {}

    with pytest.warns(UserWarning, match=r"\['1'\] are not part of the adapter.*modules_to_save"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), norm), config(target_modules=["0"], **excluded))


def test_norm_that_pefts_lora_trains_in_place_is_the_same_in_eval_mode() -> None:
    x, outputs = 3 * torch.randn(8, 3, 8, 8), []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for config_type in (LoraConfig, ConvLoraConfig):
        model = get_peft_model(copy.deepcopy(network), config_type(target_modules=["0"])).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        outputs.append(model(x))

    torch.testing.assert_close(*outputs)


def test_copies_and_pickles_reset_their_own_statistics(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = get_peft_model(network, lora_config()).train()
    model(torch.randn(8, 3, 8, 8) + 5)
    torch.save(model, tmp_path / "model")
    before = _statistics(model)
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)):
        other.base_model.model[1].base_layer.reset_running_stats()
        assert torch.equal(other.base_model.model[1].states["default"].running_mean, torch.zeros(4))
    assert _equal(_statistics(model), before)
