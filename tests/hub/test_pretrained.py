from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig
from peft_edge.backbones import class_names, fingerprint, grow_head, load_backbone, save_backbone, set_class_names
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.hub.pretrained import _without_values
from tests.hub.support import adapted, change_json

NAME = "test_efficientnet"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """Return the folder of a saved adapter, images, and the logits of the adapted model for these images."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    save_backbone(load_backbone(NAME, num_classes=7), folder / "base")
    model = adapted(load_backbone(str(folder / "base")))
    save_adapter(model, folder / "adapter")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return folder / "adapter", images, model(images)


@pytest.fixture
def copied(saved: tuple[Path, Tensor, Tensor], tmp_path: Path) -> Path:
    """Return the folder of a copy of the saved adapter. A test may change the copy."""
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@torch.no_grad()
def test_adapter_loads_with_its_backbone(saved: tuple[Path, Tensor, Tensor]) -> None:
    folder, images, expected = saved
    model = load_pretrained(folder)
    assert not model.training
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_adapter_loads_on_a_given_backbone(saved: tuple[Path, Tensor, Tensor]) -> None:
    folder, images, expected = saved
    base = load_backbone(str(folder.parent / "base"))
    assert torch.equal(load_pretrained(folder, base=base)(images), expected)


def test_head_gets_the_size_of_the_adapter(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="random weights"):
        reloaded = load_pretrained(tmp_path / "adapter", allow_other_base=True)
    assert reloaded(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_saved_card_shows_how_to_load(saved: tuple[Path, Tensor, Tensor]) -> None:
    card = (saved[0] / "README.md").read_text()
    assert "import peft_edge\nmodel = peft_edge.load_pretrained(" in card
    assert "library_name: peft" in card.split("---")[1]
    assert str(saved[0].parent) not in card


def test_saving_again_replaces_the_adapter(tmp_path: Path) -> None:
    model = adapted(load_backbone(NAME, num_classes=3))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "left_over.txt").write_text("")
    save_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.json",
        "preprocessing.json",
    }


def other_weights(base: nn.Module, name: str) -> nn.Module:
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_parameter(name).flatten()[0] += 1
    return other


METHODS = {
    "our LoRA": lambda: ConvLoraConfig(norm="stats", r=2, target_modules="all-conv", modules_to_save=["classifier"]),
    "norms only": lambda: ConvLoraConfig(target_modules="pointwise", norm="affine"),
    "Conv-Adapter": lambda: ConvAdapterConfig(norm="stats", target_modules="pointwise", modules_to_save=["classifier"]),
    "PEFT's LoRA": lambda: LoraConfig(r=2, target_modules=["conv_pw", "conv_head"], modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv_stem.weight", "bn1.bias", "conv_head.weight"])
def test_other_weights_of_the_same_network_are_refused(method: str, name: str, tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    model = get_peft_model(copy.deepcopy(base), METHODS[method]())
    model.train()(torch.randn(4, 3, 32, 32))  # updates BatchNorm statistics, which are no weights
    save_adapter(model, tmp_path / "adapter")
    other = other_weights(base, name)
    before = fingerprint(other)
    load_pretrained(tmp_path / "adapter", base=base)
    with pytest.raises(ValueError, match="was trained on other weights of this network"):
        load_pretrained(tmp_path / "adapter", base=other)
    assert fingerprint(other) == before
    load_pretrained(tmp_path / "adapter", base=other, allow_other_base=True)
    # Adapters of PEFT's own `save_pretrained` have no fingerprint.
    (tmp_path / "adapter" / "base_fingerprint.json").unlink()
    load_pretrained(tmp_path / "adapter", base=other)


@pytest.mark.parametrize("norm", ["frozen", "stats"])
@pytest.mark.parametrize("config_cls", [ConvLoraConfig, ConvAdapterConfig])
def test_other_statistics_are_refused_where_the_adapter_uses_them(
    config_cls: type[PeftConfig], norm: str, tmp_path: Path
) -> None:
    base = load_backbone(NAME, num_classes=3)
    model = get_peft_model(copy.deepcopy(base), config_cls(target_modules="pointwise", norm=norm))
    model.train()(torch.randn(4, 3, 32, 32))
    save_adapter(model, tmp_path / "adapter")
    other = copy.deepcopy(base)
    other.bn1.running_var[0] += 1
    load_pretrained(tmp_path / "adapter", base=base)
    if norm == "stats":
        load_pretrained(tmp_path / "adapter", base=other)
    else:
        with pytest.raises(ValueError, match="was trained on other BatchNorm statistics of this network"):
            load_pretrained(tmp_path / "adapter", base=other)


def test_fingerprint_of_an_earlier_version_is_compared(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    save_adapter(get_peft_model(copy.deepcopy(base), ConvLoraConfig(target_modules="pointwise")), tmp_path / "adapter")
    file = tmp_path / "adapter" / "base_fingerprint.json"
    file.write_text(json.dumps(json.loads(file.read_text())["parameters"]))
    load_pretrained(tmp_path / "adapter", base=base)
    with pytest.raises(ValueError, match="was trained on other weights of this network"):
        load_pretrained(tmp_path / "adapter", base=other_weights(base, "conv_stem.weight"))


def test_weights_that_the_adapter_replaces_may_differ(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    save_adapter(adapted(copy.deepcopy(base)), tmp_path / "adapter")
    load_pretrained(tmp_path / "adapter", base=other_weights(base, "classifier.weight"))
    load_pretrained(tmp_path / "adapter", base=load_with_head(base, 7))


def load_with_head(base: nn.Module, num_classes: int) -> nn.Module:
    other = copy.deepcopy(base)
    other.reset_classifier(num_classes)
    return other


def test_damaged_fingerprint_is_named(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    save_adapter(adapted(copy.deepcopy(base)), tmp_path / "adapter")
    (tmp_path / "adapter" / "base_fingerprint.json").write_text("{}")
    with pytest.raises(ValueError, match=r"base_fingerprint\.json: expected the fingerprint of the base"):
        load_pretrained(tmp_path / "adapter", base=base)


@pytest.mark.parametrize("adapter", ["no/such/adapter", "/no/such/folder", "none"])
def test_missing_adapter_is_named(adapter: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{adapter}: expected the folder of an adapter"):
        load_pretrained(adapter)


@pytest.mark.parametrize("adapter", ["runs/quikstart/adapter", "runs/quickstart/adaptor", "run/quickstart/adapter"])
def test_nearest_folder_is_suggested(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart" / "adapter").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as found:
        load_pretrained(adapter)
    problem = "expected the folder of an adapter, found no such folder. Did you mean runs/quickstart/adapter?"
    assert str(found.value) == f"{adapter}: {problem}"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("adapter/x", "Pass its subfolder .*run/adapter"),
        ("model/x", "Pass its subfolder .*run/model"),
        ("config.json", "load_backbone"),
    ],
)
def test_folder_of_a_run_or_of_a_model_is_named(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"run contains no adapter.*{advice}$"):
        load_pretrained(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 8])
def test_edited_rank_is_refused_with_advice(copied: Path, rank: int) -> None:
    change_json(copied / "adapter_config.json", r=rank)
    with pytest.raises(
        ValueError, match=r"does not fit this backbone: (?!ValueError).*If adapter_config.json was edited"
    ):
        load_pretrained(copied)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_pretrained(copied)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_named(copied: Path, share: float) -> None:
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or damaged: \d+ bytes"):
        load_pretrained(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_configuration_is_named(copied: Path, text: str) -> None:
    (copied / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json: expected the configuration of an adapter"):
        load_pretrained(copied)


def test_adapter_of_a_transformers_model_is_refused_with_advice(copied: Path) -> None:
    mapping = {
        "base_model_class": "TimmWrapperForImageClassification",
        "parent_library": "transformers.models.timm_wrapper.modeling_timm_wrapper",
    }
    change_json(copied / "adapter_config.json", auto_mapping=mapping)
    message = r"the transformers model 'TimmWrapperForImageClassification': load it with peft\.AutoPeftModel"
    with pytest.raises(ValueError, match=message):
        load_pretrained(copied)


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet10t", "mobilenetv3_small_050"])
def test_adapter_for_another_backbone_is_refused(saved: tuple[Path, Tensor, Tensor], name: str) -> None:
    base = load_backbone(name, num_classes=7)
    with pytest.raises(
        ValueError, match=rf"the adapter does not fit this backbone: .*It was made for .*{saved[0].parent}"
    ):
        load_pretrained(saved[0], base=base)


@pytest.mark.parametrize("problem", ["is not in the adapter", "has no place in this backbone"])
def test_tensor_that_does_not_fit_is_named(copied: Path, problem: str) -> None:
    file = copied / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    if problem == "is not in the adapter":
        del tensors[name]
    else:
        name = "base_model.model.conv_stem_2.lora_A.weight"
        tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{name} {problem}"):
        load_pretrained(copied)


def test_missing_backbone_is_named(copied: Path) -> None:
    change_json(copied / "adapter_config.json", base_model_name_or_path=str(copied / "gone"))
    with pytest.raises(FileNotFoundError, match=r"gone, the backbone of .* is missing: restore it, or pass"):
        load_pretrained(copied)


def test_relative_path_of_a_backbone_is_loaded(
    saved: tuple[Path, Tensor, Tensor], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images, expected = saved
    change_json(copied / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(folder.parent)
    with torch.no_grad():
        assert torch.equal(load_pretrained(copied)(images), expected)


def test_class_names_are_saved_with_the_adapter(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    save_backbone(base, tmp_path / "base")
    names = ["owl", "été", "9"]
    set_class_names(base, names)
    base.name_or_path = str(tmp_path / "base")
    save_adapter(adapted(base), tmp_path / "adapter")
    assert class_names(load_pretrained(tmp_path / "adapter")) == names


@torch.no_grad()
def test_adapter_with_more_classes_grows_the_head(tmp_path: Path) -> None:
    source = load_backbone(NAME, num_classes=4)
    set_class_names(source, list("abcd"))
    save_backbone(source, tmp_path / "base")
    base = load_backbone(str(tmp_path / "base"))
    grow_head(base, 6)
    set_class_names(base, list("abcdxy"))
    with torch.enable_grad():
        model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32)
    for own in (None, load_backbone(str(tmp_path / "base"))):
        reloaded = load_pretrained(tmp_path / "adapter", base=own)
        assert torch.equal(reloaded(images), model(images))
        assert class_names(reloaded) == list("abcdxy")
        with reloaded.disable_adapter():
            assert torch.equal(reloaded(images)[:, :4], source.eval()(images))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[", "Expecting value"), ('{"a": 1}', "found dict"), ('["a"]', "of the 7 classes .* found 1")],
)
def test_class_names_that_do_not_fit_are_refused(copied: Path, text: str, problem: str) -> None:
    (copied / "label_names.json").write_text(text)
    with pytest.raises(ValueError, match=rf"label_names.json does not name the classes of the adapter: .*{problem}"):
        load_pretrained(copied)


PREPROCESSING = {
    "input_size": [3, 48, 40],
    "interpolation": "bilinear",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "crop_pct": 0.9,
    "crop_mode": "squash",
}


def preprocessing(model: nn.Module) -> object:
    return json.loads(json.dumps(resolve_model_data_config(model)))


def test_adapter_brings_its_preprocessing_to_any_copy_of_the_base(saved: tuple[Path, Tensor, Tensor]) -> None:
    folder = saved[0]
    changed, plain = (load_backbone(str(folder.parent / "base")) for _ in range(2))
    changed.pretrained_cfg.update(PREPROCESSING)
    model = get_peft_model(copy.deepcopy(changed), ConvLoraConfig(target_modules="dense", norm="frozen"))
    save_adapter(model, folder.parent / "other")
    assert preprocessing(load_pretrained(folder.parent / "other", base=plain)) == PREPROCESSING
    assert preprocessing(load_pretrained(folder, base=changed)) == preprocessing(plain) != PREPROCESSING


def test_adapter_without_a_preprocessing_keeps_that_of_the_base(copied: Path) -> None:
    (copied / "preprocessing.json").unlink()
    base = load_backbone(NAME, num_classes=7)
    base.pretrained_cfg.update(PREPROCESSING)
    assert preprocessing(load_pretrained(copied, base=base, allow_other_base=True)) == PREPROCESSING


@pytest.mark.parametrize(
    "changes",
    [
        *({"mean": [2, 0, 0]}, {"std": "x"}, {"interpolation": []}, {"crop_mode": "a"}, {"file": "/etc/passwd"}),
        *({"input_size": [3, 10**9, 32]}, {"input_size": [3, -1, 32]}, {"input_size": 7}, {"input_size": [1, 32, 32]}),
        *({"crop_pct": 1e-9}, {"crop_pct": 10**400}, {"crop_pct": None}),
    ],
)
def test_preprocessing_that_is_damaged_is_refused(copied: Path, changes: dict[str, object]) -> None:
    (copied / "preprocessing.json").write_text(json.dumps(PREPROCESSING | changes))
    with pytest.raises(ValueError, match=r"preprocessing.json is not the preprocessing of the adapter: .*Copy the"):
        load_pretrained(copied)


def test_adapter_with_outdated_class_names_is_not_saved(tmp_path: Path) -> None:
    base = load_backbone(NAME, num_classes=3)
    set_class_names(base, ["a", "b", "c"])
    base.reset_classifier(2)
    with pytest.raises(ValueError, match="expected one for each of the 2 classes of the head, found 3"):
        save_adapter(adapted(base), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 10**9}, r"size mismatch for .*lora_A.*: expected \(1000000000, "),
        (
            {"target_modules": "(?!classifier).*"},
            "target_modules: .* is not a regular expression that can be",
        ),
        ({"target_modules": "(.*)*conv_"}, "No modules were targeted"),
        ({"modules_to_save": None}, r"classifier\.\w+ has no place in this backbone"),
    ],
)
def test_refused_adapter_does_not_change_the_given_backbone(
    copied: Path, changes: dict[str, object], problem: str, saved: tuple[Path, Tensor, Tensor]
) -> None:
    change_json(copied / "adapter_config.json", **changes)
    base = load_backbone(str(saved[0].parent / "base"))
    before = fingerprint(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=problem):
        load_pretrained(copied, base=base)
    assert (fingerprint(base), [name for name, _ in base.named_modules()]) == before


def test_values_that_are_not_finite_are_refused(copied: Path) -> None:
    tensors = load_file(copied / "adapter_model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, copied / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        load_pretrained(copied)


@torch.no_grad()
def test_backbone_in_the_folder_of_the_adapter_is_checked(copied: Path, saved: tuple[Path, Tensor, Tensor]) -> None:
    folder, images, expected = saved
    save_backbone(load_backbone(str(folder.parent / "base")), copied / "source_model")
    assert torch.equal(load_pretrained(copied)(images), expected)
    file = copied / "source_model" / "config.json"
    config = json.loads(file.read_text())
    for change, problem in (
        ({"architecture": "vit_giant_patch14_224"}, "expected a backbone: ValueError"),
        ({"architecture": "resnet50"}, "does not fit resnet50"),
        ({"model_args": {"checkpoint_path": "/tmp/evil.pth"}}, "model_args: 'checkpoint_path' is not accepted"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=problem):
            load_pretrained(copied)


def test_fit_is_checked_without_a_copy_of_the_weights() -> None:
    class Uncopied(nn.Parameter):
        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("the weights are copied")

    model = load_backbone(NAME, num_classes=3)
    model.conv_stem.weight = Uncopied(model.conv_stem.weight.data)
    model.conv_head.weight = model.conv_stem.weight  # shared
    found = _without_values(model)
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"meta"}
    assert found.conv_head.weight is found.conv_stem.weight
    assert {name: tensor.shape for name, tensor in found.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert model.conv_stem.weight.device.type == "cpu"
