from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_edge.backbones import EDGE_FAMILIES, fingerprint, load_backbone, save_backbone


def publish(repo_id: str, model: nn.Module) -> Path:
    """Puts a model into the Hub's local cache, as a download of that repository would; HF_HOME is the tests' own."""
    repository = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    save_backbone(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("name", EDGE_FAMILIES.values())
def test_every_edge_family_loads_with_random_weights(name: str, images: torch.Tensor) -> None:
    model = load_backbone(name, 10).eval()
    with torch.no_grad():
        assert model(images).shape == (4, 10)
    assert model.name_or_path == name


def test_pretrained_weights_come_from_the_hub_id_of_the_model(images: torch.Tensor) -> None:
    published = timm.create_model("mobilenetv3_small_050").eval()
    publish("timm/mobilenetv3_small_050.lamb_in1k", published)
    for name in ("mobilenetv3_small_050", "mobilenetv3_small_050.lamb_in1k", "timm/mobilenetv3_small_050.lamb_in1k"):
        model = load_backbone(name, pretrained=True).eval()
        assert model.name_or_path == "timm/mobilenetv3_small_050.lamb_in1k"
        with torch.no_grad():
            assert torch.equal(model(images), published(images))

    adapted = load_backbone("mobilenetv3_small_050", 10, pretrained=True)
    assert torch.equal(adapted.conv_stem.weight, published.conv_stem.weight)
    assert adapted.classifier.weight.shape[0] == 10


def test_any_hub_repository_in_timms_format_loads(tiny_backbone: nn.Module) -> None:
    publish("someone/defects", tiny_backbone)
    model = load_backbone("someone/defects", pretrained=True)
    assert fingerprint(model) == fingerprint(tiny_backbone)
    assert model.name_or_path == "someone/defects"


def test_a_hub_repository_without_safetensors_is_not_unpickled(tiny_backbone: nn.Module) -> None:
    snapshot = publish("someone/pickled", tiny_backbone)
    torch.save(tiny_backbone.state_dict(), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors of 'someone/pickled' is not in the local cache"):
        load_backbone("someone/pickled", pretrained=True)


def test_pretrained_without_network_says_what_to_do() -> None:
    with pytest.raises(OSError, match=r"timm/resnet10t\.c3_in1k' is not in the local cache.*\n.*pass checkpoint="):
        load_backbone("resnet10t", pretrained=True)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv2_050.no_such_tag"])
def test_a_model_without_such_weights_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no pretrained weights called '{name}'"):
        load_backbone(name, pretrained=True)


def test_a_checkpoint_keeps_its_classes_unless_told(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    save_backbone(tiny_backbone, tmp_path / "saved")
    for checkpoint in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        kept = load_backbone("mobilenetv2_035", checkpoint=checkpoint)
        assert fingerprint(kept) == fingerprint(tiny_backbone)
        assert kept.name_or_path == str(checkpoint)
        same = load_backbone("mobilenetv2_035", 10, checkpoint=checkpoint)
        assert fingerprint(same) == fingerprint(tiny_backbone)
        other = load_backbone("mobilenetv2_035", 4, checkpoint=checkpoint)
        assert other.classifier.weight.shape[0] == other.num_classes == 4
        assert torch.equal(other.conv_stem.weight, tiny_backbone.conv_stem.weight)


def test_name_or_path_loads_the_same_model_again(
    tmp_path: Path, tiny_backbone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_backbone(tiny_backbone, tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    name_or_path = load_backbone("mobilenetv2_035", checkpoint="saved").name_or_path
    assert Path(name_or_path).is_absolute()
    assert fingerprint(load_backbone(name_or_path)) == fingerprint(tiny_backbone)


def test_a_folder_named_like_a_model_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mobilenetv2_035").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_backbone("mobilenetv2_035", 10).name_or_path == "mobilenetv2_035"


def test_peft_records_the_name() -> None:
    model = get_peft_model(load_backbone("mobilenetv2_035", 10), LoraConfig(target_modules=["conv_head"]))
    assert model.peft_config["default"].base_model_name_or_path == "mobilenetv2_035"


def test_timm_arguments_are_passed_on() -> None:
    assert load_backbone("mobilenetv2_035", 10, in_chans=1).conv_stem.in_channels == 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mobilnetv2_100", "mobilenetv2_100"), ("timm/resnet_18", "resnet18"), ("resnt10t", "resnet10t")],
)
def test_an_unknown_model_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is neither a timm model nor .* nearest are .*\b{nearest}\b"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_model_without_convolutions_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no convolution beyond its patch embedding"):
        load_backbone(name)


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        load_backbone("resnet10t", pretrained=True, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found -1"):
        load_backbone("resnet10t", -1)
    with pytest.raises(ValueError, match="nor a Hub id"):
        load_backbone("no/such/folder", pretrained=True)


def test_a_checkpoint_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: expected a folder written by save_backbone.* found nothing"):
        load_backbone("resnet10t", checkpoint=tmp_path / "absent")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"found a file of another kind\. Pickled weights .* are not read"):
        load_backbone("resnet10t", checkpoint=tmp_path / "weights.pth")
