"""BatchNorm layers of adapters, and `recalibrate`, against torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from peft_edge import recalibrate
from peft_edge.tuners.norm import BatchNormLayer

Adapt = Callable[..., nn.Module]
Config = Callable[..., PeftConfig]


class _Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = norm or nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.fixture
def adapt(config_cls: type[PeftConfig]) -> Adapt:
    return lambda net, norm="stats": get_peft_model(net, config_cls(target_modules=["conv"], norm=norm))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 5, 5) * 2 + 1


@pytest.mark.parametrize("norm", ["stats", "affine"])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), BatchNormAct2d(4)])
def test_trains_as_torchs_batch_norm(adapt: Adapt, layer: nn.Module, norm: str, x: Tensor) -> None:
    reference = _Net(copy.deepcopy(layer)).train()
    model = adapt(copy.deepcopy(reference), norm).train()

    for _ in range(3):
        expected, got = reference(x), model(x)
        torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()

    adapted = model.base_model.model.norm
    state = adapted.states["default"]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(state, name), getattr(reference.norm, name))
    if norm == "affine":
        torch.testing.assert_close(state.weight.grad, reference.norm.weight.grad)
        torch.testing.assert_close(state.bias.grad, reference.norm.bias.grad)
    assert adapted.base_layer.weight.grad is None
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("norm", ["frozen", "recalibrate"])
def test_base_statistics_are_used_in_training_mode(adapt: Adapt, norm: str, x: Tensor) -> None:
    net = _Net().eval()
    expected = net(x)

    model = adapt(net, norm).train()

    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_base_layer_never_changes(adapt: Adapt, x: Tensor) -> None:
    model = adapt(_Net(), "affine").train()
    before = copy.deepcopy(model.base_model.model.norm.base_layer.state_dict())

    model(x)
    with model.disable_adapter():
        model(x)

    for name, value in model.base_model.model.norm.base_layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_trainable_parameters_depend_on_the_mode(adapt: Adapt) -> None:
    expected = {"frozen": [], "recalibrate": [], "stats": [], "affine": ["default.weight", "default.bias"]}
    for norm, names in expected.items():
        trained = [name for name, p in adapt(_Net(), norm).named_parameters() if p.requires_grad and "_norm." in name]
        assert [name.partition("_norm.")[2] for name in trained] == names


def test_saved_entries_depend_on_the_mode(adapt: Adapt) -> None:
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    expected = {
        "frozen": set(),
        "recalibrate": statistics,
        "stats": statistics,
        "affine": statistics | {"weight", "bias"},
    }
    for norm, names in expected.items():
        saved = get_peft_model_state_dict(adapt(_Net(), norm))
        assert {key.rpartition(".")[2] for key in saved if "_norm." in key} == names


def _two_domains(x: Tensor, config: Config) -> nn.Module:
    model = get_peft_model(_Net(), config(target_modules=["conv"], norm="affine")).train()
    model.add_adapter("dark", config(target_modules=["conv"], norm="stats"))
    for name, batch in {"default": x, "dark": x * 0.1}.items():
        model.set_adapter(name)
        for _ in range(5):
            model(batch)
    nn.init.normal_(model.base_model.model.norm.states["default"].weight)
    return model.eval()


def _outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for name in ("default", "dark"):
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        outputs["__base__"] = model(x)
    return outputs


def test_mixed_batch_uses_each_adapters_statistics(config: Config, x: Tensor) -> None:
    model = _two_domains(x, config)
    outputs = _outputs(model, x)
    names = ["default", "dark", "__base__", "dark", "default", "__base__", "dark", "default"]

    mixed = model(x, adapter_names=names)

    assert not torch.allclose(outputs["default"], outputs["dark"])
    torch.testing.assert_close(mixed, torch.stack([outputs[name][row] for row, name in enumerate(names)]))


def test_last_active_adapter_normalises(config: Config, x: Tensor) -> None:
    model = _two_domains(x, config)
    layer = model.base_model.model.norm
    y = torch.randn(8, 4, 5, 5)
    model.base_model.set_adapter(["default", "dark"])
    together = layer(y)
    model.set_adapter("dark")

    torch.testing.assert_close(together, layer(y))


def test_merging_keeps_the_output_and_unmerging_restores_the_base(config: Config, x: Tensor) -> None:
    model = _two_domains(x, config)
    outputs = _outputs(model, x)
    base = copy.deepcopy(model.base_model.model.norm.base_layer.state_dict())
    for name in ("default", "dark"):
        model.set_adapter(name)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), outputs[name])
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), outputs[name])
    for name, value in model.base_model.model.norm.base_layer.state_dict().items():
        assert torch.equal(value, base[name])
    merged = model.merge_and_unload()
    assert type(merged.norm) is nn.BatchNorm2d
    torch.testing.assert_close(merged(x), outputs["dark"])


def test_deleting_an_adapter_keeps_the_other(config: Config, x: Tensor) -> None:
    model = _two_domains(x, config)
    expected = _outputs(model, x)["default"]

    model.set_adapter("default")
    model.delete_adapter("dark")

    assert list(model.base_model.model.norm.states) == ["default"]
    torch.testing.assert_close(model(x), expected)


def test_gradient_checkpointing_counts_a_batch_once(adapt: Adapt, x: Tensor) -> None:
    model = adapt(_Net(), "affine").train()
    plain = copy.deepcopy(model)

    y, expected = checkpoint(model, x, use_reentrant=False), plain(x)
    y.square().sum().backward()
    expected.square().sum().backward()

    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)


def test_half_precision_statistics_keep_moving(adapt: Adapt) -> None:
    model = adapt(_Net().bfloat16()).train()
    x = torch.ones(8, 3, 4, 4, dtype=torch.bfloat16)
    for _ in range(500):
        y = model(x)

    conv = model.base_model.model.conv(x).float().mean((0, 2, 3))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(model.base_model.model.norm.states["default"].running_mean, conv)


def test_cumulative_average_continues_that_of_the_base_model(adapt: Adapt, x: Tensor) -> None:
    """With `momentum=None`, each batch has the weight 1 / n. The batches of the base model count too, as in torch."""
    net = _Net()
    net.norm.momentum = None
    for batch in (x, x + 1):
        net.train()(batch)
    plain = copy.deepcopy(net)
    model = adapt(net).train()
    for batch in (2 * x, 3 * x):
        plain(batch)
        model(batch)

    merged = model.merge_and_unload()

    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(merged.norm, name), getattr(plain.norm, name))


def test_layers_without_weight_are_adapted(adapt: Adapt, x: Tensor) -> None:
    net = nn.Sequential()
    net.conv, net.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
    model = adapt(net, "affine").train()

    model(x)

    assert isinstance(model.base_model.model.norm, BatchNormLayer)
    assert model.base_model.model.norm.states["default"].num_batches_tracked == 1


def test_subclass_of_batch_norm_is_rejected_by_name(adapt: Adapt) -> None:
    class Other(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    with pytest.raises(ValueError, match=r"'norm': Other is not a plain batch normalisation.*exclude_modules"):
        adapt(_Net(Other(4)))


def test_every_batch_norm_of_a_timm_model_is_adapted(config_cls: type[PeftConfig], tiny_backbone: nn.Module) -> None:
    count = sum(isinstance(module, nn.BatchNorm2d) for module in tiny_backbone.modules())

    model = get_peft_model(tiny_backbone, config_cls(target_modules=["conv_stem"]))

    assert sum(isinstance(module, BatchNormLayer) for module in model.modules()) == count == 52


AdaptAll = Callable[..., nn.Module]


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randn(6, 3, 32, 32) * 0.3 + 0.5 for _ in range(3)]


@pytest.fixture
def adapt_all(config_cls: type[PeftConfig]) -> AdaptAll:
    return lambda model, norm="recalibrate": get_peft_model(model, config_cls(target_modules="depthwise", norm=norm))


def test_recalibrate_equals_update_bn_of_torch(
    adapt_all: AdaptAll, tiny_backbone: nn.Module, batches: list[torch.Tensor]
) -> None:
    reference = copy.deepcopy(tiny_backbone)
    model = adapt_all(tiny_backbone).train()

    recalibrate(model, batches)
    update_bn(batches, reference)

    assert model.training
    # The untrained adapter keeps the output, so only the statistics can differ from the reference.
    torch.testing.assert_close(model.eval()(batches[0]), reference.eval()(batches[0]))


def test_recalibrated_statistics_are_constant_and_saved(
    adapt_all: AdaptAll, tiny_backbone: nn.Module, batches: list[torch.Tensor], tmp_path: object
) -> None:
    fresh = copy.deepcopy(tiny_backbone)
    model = adapt_all(tiny_backbone)
    recalibrate(model, batches)
    expected = model.eval()(batches[0])

    model.train()(batches[1])
    model.eval().save_pretrained(tmp_path)

    assert torch.equal(model(batches[0]), expected)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(batches[0]), expected)


def test_failing_batch_restores_the_statistics(
    adapt_all: AdaptAll, tiny_backbone: nn.Module, batches: list[torch.Tensor]
) -> None:
    model = adapt_all(tiny_backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(RuntimeError, match="expected input"):
        recalibrate(model, [*batches, torch.zeros(2, 7, 8, 8)])

    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_recalibrate_without_own_statistics_raises(
    adapt_all: AdaptAll, tiny_backbone: nn.Module, batches: list[torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match="no active adapter has BatchNorm statistics"):
        recalibrate(adapt_all(tiny_backbone, "frozen"), batches)
    with pytest.raises(ValueError, match="no active adapter"):
        recalibrate(timm.create_model("mobilenetv2_035"), batches)


def test_recalibrate_without_batches_raises(adapt_all: AdaptAll, tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="got no batch"):
        recalibrate(adapt_all(tiny_backbone), [])
