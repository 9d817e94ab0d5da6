"""Tensors and modules in two places, and calls that are refused without changing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from peft_edge import ConvAdapterConfig, ConvLoraConfig, ConvLoraLayer
from peft_edge.optim import galore_param_groups
from tests.tuners.support import lora_config, shifted

Config = Callable[..., PeftConfig]


class _Shared(nn.Module):
    """A network that uses one convolution, one norm and one block in two places each."""

    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.first = nn.Sequential(conv, norm, nn.ReLU(), conv)
        self.second = nn.ModuleDict({"conv": conv, "norm": norm, "block": block, "again": block})

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for module in self.second.values():
            y = module(y)
        return y


def _freeze(network: nn.Module) -> tuple[list[object], list[object]]:
    modules = [(name, type(module), id(module)) for name, module in network.named_modules()]
    return modules, [(name, p.requires_grad, p.data_ptr()) for name, p in network.named_parameters()]


@pytest.mark.parametrize("norm", ["frozen", "stats", "affine"])
def test_shared_modules_are_adapted_in_all_places(config: Config, tmp_path: Path, norm: str) -> None:
    network, x = _Shared(), torch.randn(4, 3, 8, 8)
    base, before = copy.deepcopy(network), _freeze(network)
    model = shifted(get_peft_model(network, config(norm=norm)), x)
    expected = model(x)

    assert network.first[0] is network.first[3] is network.second["conv"]
    assert network.first[1] is network.second["norm"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(loaded.merge_and_unload()(x), expected, atol=1e-4, rtol=1e-4)
    model.unload()
    assert _freeze(network)[0] == before[0]
    for name, value in base.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize("name", ["weight", "bias", "norm", "modules_to_save"])
def test_tied_tensors_are_refused_by_name(config: Config, name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Flatten())
    head = nn.Linear(3, 2)
    network.head, network.aux = head, nn.Sequential(head)
    options = {"modules_to_save": ["head"]} if name == "modules_to_save" else {}
    if name in ("weight", "bias"):
        setattr(network[0], name, getattr(network[1], name))
    elif name == "norm":
        network[2].weight = network[3].weight
    before = _freeze(network)
    expected = {
        "weight": r"'0': 0.weight and 1.weight are one tensor.*exclude_modules=\['0'\]",
        "bias": r"'0': 0.bias and 1.bias are one tensor",
        "norm": r"'2': 2.weight and 3.weight are one tensor",
        "modules_to_save": "'head' is in 2 places",
    }

    with pytest.raises(ValueError, match=expected[name]):
        get_peft_model(network, config(target_modules=["0", "1"], **options))

    assert _freeze(network) == before


def _with_transposed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 3, 1))


def _with_untracked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Flatten())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, object], str, str]] = {
    "transposed": (_with_transposed, {"target_modules": ["0", "2"]}, "default", "ConvTranspose2d"),
    "untracked": (_with_untracked, {"target_modules": ["0", "1"]}, "default", "'1'.*no running statistics"),
    "no head": (_with_transposed, {"target_modules": ["0"], "modules_to_save": ["1.2"]}, "a.b", "no dot, found 'a.b'"),
    "name": (_with_transposed, {"target_modules": ["0"]}, "a.b", "no dot, found 'a.b'"),
    "dictionary's name": (_with_transposed, {"target_modules": ["0"]}, "keys", "keys"),
    "nothing": (_with_transposed, {"target_modules": ["9"]}, "default", "not found"),
}


@pytest.mark.parametrize("is_further", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_adapter_changes_nothing(config: Config, case: str, *, is_further: bool) -> None:
    make, options, adapter, message = REFUSED[case]
    network = make()
    network[0].weight.requires_grad_(False)
    if is_further:
        model = get_peft_model(network, config(target_modules=["0"]))
        layer = network[0]
        adapter = "other" if adapter == "default" else adapter
        dictionaries = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
    wrong = config(**options)
    before, written = _freeze(network), copy.deepcopy(vars(wrong))

    with pytest.raises((ValueError, KeyError), match=message):
        model.add_adapter(adapter, wrong) if is_further else get_peft_model(network, wrong, adapter)

    assert _freeze(network) == before
    assert {name: value for name, value in vars(wrong).items() if name in written and name != "_custom_modules"} == {
        name: value for name, value in written.items() if name != "_custom_modules"
    }
    if is_further:
        after = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
        assert {name: list(value) for name, value in after.items()} == {
            name: list(value) for name, value in dictionaries.items()
        }
        assert list(model.peft_config) == ["default"]
        model.add_adapter("other", config(target_modules=["0"]))
    else:
        model = get_peft_model(network, config(target_modules=["0"], norm="frozen"))
        prefixes = ("lora_", "conv_adapter_")
        assert all(any(p in name for p in prefixes) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("path", ["lora_body", "explora_net", "conv_adapter_body"])
def test_prefix_in_a_modules_path_does_not_confuse(config: Config, tmp_path: Path, path: str) -> None:
    network = nn.ModuleDict({path: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))})
    base = copy.deepcopy(network)
    model = get_peft_model(network, config(target_modules=["0"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".default." in name for name in trained)
    model.add_adapter("b", config(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])

    model.set_adapter("b")
    model.delete_adapter("default")

    assert not [name for name in model.state_dict() if ".default" in name]
    assert model.active_adapters == ["b"]
    model.delete_adapter("b")
    assert not [name for name in model.state_dict() if ".b." in name]


@pytest.mark.parametrize(("network", "head", "layer"), [
    (lraspp_mobilenet_v3_large, "classifier", "classifier.low_classifier"),
    (ssdlite320_mobilenet_v3_large, "head", "head.classification_head"),
])  # fmt: skip
def test_head_whose_name_is_an_inner_name_too_is_saved(
    tmp_path: Path, network: Callable[..., nn.Module], head: str, layer: str
) -> None:
    base = network(weights=None, weights_backbone=None, num_classes=3)
    model = get_peft_model(copy.deepcopy(base), lora_config(target_modules="depthwise", modules_to_save=[head]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and f"model.{head}." in name}
    plain = dict(base.get_submodule(head).named_parameters())
    assert {name.replace(".modules_to_save.default", "").split(f".{head}.")[1] for name in trained} == set(plain)
    for parameter in trained.values():
        nn.init.normal_(parameter)

    model.save_pretrained(tmp_path)

    assert layer.partition(".")[0] == head
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value)


def test_names_that_cannot_be_told_apart_are_refused(config: Config) -> None:
    network = nn.ModuleDict({"head": nn.ModuleDict({"my_head": nn.Linear(2, 2)}), "conv": nn.Conv2d(3, 4, 3)})
    network["head"].scale = nn.Parameter(torch.ones(1))
    before = _freeze(network)

    with pytest.raises(ValueError, match="'head' has tensors of its own"):
        get_peft_model(network, config(modules_to_save=["head"]))

    assert _freeze(network) == before


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder = nn.Conv2d(3, 3, 1), timm.create_model("dla34", num_classes=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.stem(x))


@pytest.mark.parametrize("make", [_Nested, lambda: timm.create_model("dla34", num_classes=2)])
def test_child_named_base_layer_is_no_adapter(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    network, x = make().eval(), torch.randn(2, 3, 32, 32)
    base, names = copy.deepcopy(network), [name for name, _ in network.named_modules()]
    count = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(galore_param_groups(base, rank=1)[0]["params"]) == count
    model = get_peft_model(network, lora_config(target_modules="all-conv"))
    assert sum(isinstance(module, ConvLoraLayer) for module in model.modules()) == count
    model.train()(x)
    expected = model.eval()(x)

    model.save_pretrained(tmp_path)

    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, atol=1e-3, rtol=1e-3)
    assert [name for name, _ in merged.named_modules()] == names


def test_block_with_a_child_named_base_layer_is_adapted() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    block.add_module("base_layer", nn.Conv2d(4, 4, 1))
    model = get_peft_model(nn.Sequential(block), ConvAdapterConfig(norm="stats", target_modules="0")).eval()
    x = torch.randn(2, 3, 8, 8)

    torch.testing.assert_close(model(x), block(x))
    assert model.base_model.model[0].get_base_layer() is block
    assert model.unload()[0] is block


def test_retry_after_a_refusal_trains_what_peft_trains_in_a_fresh_network() -> None:
    network = _with_transposed()
    with pytest.raises(ValueError, match="ConvTranspose2d"):
        get_peft_model(network, ConvLoraConfig(norm="stats", target_modules=["0", "2"]))
    trained = [
        {name for name, p in get_peft_model(net, cls(target_modules=["3"])).named_parameters() if p.requires_grad}
        for net, cls in ((network, ConvLoraConfig), (_with_transposed(), LoraConfig))
    ]
    assert trained[0] == trained[1]
