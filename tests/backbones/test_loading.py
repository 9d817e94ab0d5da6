"""Loading and saving backbones: Hub, checkpoints, small images, fingerprints, errors."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from peft_edge.backbones import (
    EDGE_FAMILIES,
    class_names,
    fingerprint,
    load_backbone,
    save_backbone,
    set_class_names,
    set_preprocessing,
)
from peft_edge.backbones.loading import stem_names
from tests.processes import run_program


def map_size(model: torch.nn.Module) -> int:
    """Return the width of the last feature map for an image of 64 x 64 pixels."""
    with torch.no_grad():
        return model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape[-1]


@pytest.mark.parametrize("name", EDGE_FAMILIES.values())
def test_small_images_doubles_the_resolution_of_every_family(name: str) -> None:
    assert map_size(load_backbone(name, 10)) == 2
    assert map_size(load_backbone(name, 10, small_images=True)) == 4


def test_repvgg_stem_has_two_branches() -> None:
    assert stem_names(timm.create_model("repvgg_a0")) == ("stem.conv_kxk.conv", "stem.conv_1x1.conv")
    assert stem_names(timm.create_model("mobilenetv2_035")) == ("conv_stem",)


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s"])
def test_small_images_refuses_other_stems(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does not support small_images"):
        load_backbone(name, 10, small_images=True)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "repvgg_a0"])
def test_small_images_is_saved(name: str, tmp_path: Path) -> None:
    model = load_backbone(name, 10, small_images=True).eval()
    save_backbone(model, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(str(tmp_path)).eval()(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", EDGE_FAMILIES.values())
def test_timm_reads_a_saved_backbone(name: str, tmp_path: Path, images: torch.Tensor) -> None:
    model = load_backbone(name, 10)
    with torch.no_grad():
        model(images)  # changes the running statistics
    save_backbone(model.eval(), tmp_path)
    read_by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    reloaded = load_backbone(name, checkpoint=tmp_path).eval()
    with torch.no_grad():
        expected = model(images)
        assert expected.shape == (4, 10)
        assert torch.equal(read_by_timm(images), expected)
        assert torch.equal(reloaded(images), expected)
    assert fingerprint(reloaded) == fingerprint(model)


def test_folder_written_by_timm_is_read_as_by_timm(tmp_path: Path, images: torch.Tensor) -> None:
    model = timm.create_model("fbnetc_100", num_classes=10)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    read_by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(load_backbone(str(tmp_path)).eval()(images), read_by_timm(images))


def test_constructor_arguments_are_saved_and_memory_format_is_kept(tmp_path: Path) -> None:
    model = load_backbone("mobilenetv2_035", 3, in_chans=1, global_pool="max").to(memory_format=torch.channels_last)
    save_backbone(model.eval(), tmp_path / "nested" / "folder")
    reloaded = load_backbone(str(tmp_path / "nested" / "folder")).eval()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(image), model(image))
    assert reloaded.num_classes == 3
    assert model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)  # saving does not change the model


@pytest.mark.slow
def test_another_process_reads_the_same_weights(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    save_backbone(tiny_backbone, tmp_path)
    program = "from peft_edge.backbones import *; print(fingerprint(load_backbone('.')))"
    assert run_program(program, tmp_path) == f"{fingerprint(tiny_backbone)}\n"


def test_saving_again_keeps_other_files(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        save_backbone(tiny_backbone, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_failed_save_keeps_the_old_files(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    save_backbone(tiny_backbone, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.zeros_(tiny_backbone.classifier.weight)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written .* is unchanged"):
            save_backbone(tiny_backbone, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key", ["conv_stem.weight", "bn1.running_mean", "bn1.num_batches_tracked"])
def test_fingerprint_depends_on_parameters_and_buffers(key: str, tiny_backbone: nn.Module) -> None:
    before = fingerprint(tiny_backbone)
    tensor = tiny_backbone.state_dict()[key].flatten()
    value = tensor[0].clone()
    tensor[0] += 1
    assert fingerprint(tiny_backbone) != before
    tensor[0] = value
    assert fingerprint(tiny_backbone.to(memory_format=torch.channels_last)) == before


def test_fingerprint_depends_on_dtype_and_shape() -> None:
    linear = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(linear.weight)
    prints = {fingerprint(linear), fingerprint(linear.bfloat16())}
    transposed = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(transposed.weight)
    prints.add(fingerprint(transposed))
    assert len(prints) == 3


@pytest.fixture
def saved(tmp_path: Path, tiny_backbone: nn.Module) -> Path:
    save_backbone(tiny_backbone, tmp_path / "saved")
    return tmp_path / "saved"


def test_truncated_weights_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file, found a damaged"):
        load_backbone(str(saved))


@pytest.mark.parametrize("file_name", ["model.safetensors", "config.json"])
def test_missing_file_is_named(file_name: str, saved: Path) -> None:
    (saved / file_name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file_name} is missing"):
        load_backbone(str(saved))


def test_pickled_weights_are_not_read(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in safetensors format"):
        load_backbone(str(saved))


@pytest.mark.parametrize("config", ["not json", "[]", "{}", '{"architecture": "no_such_model"}'])
def test_invalid_configuration_is_refused(config: str, saved: Path) -> None:
    (saved / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        load_backbone(str(saved))


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["conv_stem.weight"] = weights["conv_stem.weight"][:, :1].contiguous()
    del weights["bn1.weight"]
    weights["extra"] = torch.zeros(1)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit mobilenetv2_035, in 3 tensors") as error:
        load_backbone(str(saved))
    for problem in (
        "conv_stem.weight: expected (16, 3, 3, 3), found (16, 1, 3, 3)",
        "bn1.weight: expected (16,), found no such tensor",
        "extra: expected no such tensor, found (1,)",
    ):
        assert problem in str(error.value)


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="expected weights of 'resnet10t', found those of 'mobilenetv2_035'"):
        load_backbone("resnet10t", checkpoint=saved)
    with pytest.raises(ValueError, match="does not fit resnet10t"):
        load_backbone("resnet10t", checkpoint=saved / "model.safetensors")


def test_saved_configuration_names_the_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architecture"] == "mobilenetv2_035"
    assert config["num_classes"] == 10


def test_class_names_are_saved_in_their_order(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    names = [f"class {index}" for index in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    set_class_names(tiny_backbone, names)
    save_backbone(tiny_backbone, tmp_path)
    assert class_names(load_backbone(str(tmp_path))) == names
    assert class_names(load_backbone("mobilenetv2_035", checkpoint=tmp_path)) == names
    assert timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg["label_names"] == names
    assert class_names(load_backbone(str(tmp_path), num_classes=3)) is None


def test_saved_class_names_must_match_the_number_of_classes(tmp_path: Path, tiny_backbone: nn.Module) -> None:
    set_class_names(tiny_backbone, list("abcdefghij"))
    save_backbone(tiny_backbone, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = ["a", "b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: label_names do not fit the weights.* 10 classes .* found 2"):
        load_backbone(str(tmp_path))
    tiny_backbone.reset_classifier(4)
    with pytest.raises(ValueError, match="4 classes of the head, found 10"):
        save_backbone(tiny_backbone, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def publish(repo_id: str, model: nn.Module) -> Path:
    """Save `model` in the local cache of the Hub, as if the repository `repo_id` had been downloaded.

    Return the folder of the model. The cache is in a temporary HF_HOME.
    """
    repository = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    save_backbone(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("name", EDGE_FAMILIES.values())
def test_every_family_loads_with_random_weights(name: str, images: torch.Tensor) -> None:
    model = load_backbone(name, 10).eval()
    with torch.no_grad():
        assert model(images).shape == (4, 10)
    assert model.name_or_path == name


def test_pretrained_weights_are_those_of_the_models_hub_id(images: torch.Tensor) -> None:
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


def test_hub_repository_in_timms_format_loads(tiny_backbone: nn.Module) -> None:
    publish("someone/defects", tiny_backbone)
    model = load_backbone("someone/defects", pretrained=True)
    assert fingerprint(model) == fingerprint(tiny_backbone)
    assert model.name_or_path == "someone/defects"


def test_hub_repository_without_safetensors_is_not_unpickled(tiny_backbone: nn.Module) -> None:
    snapshot = publish("someone/pickled", tiny_backbone)
    torch.save(tiny_backbone.state_dict(), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors of 'someone/pickled' is not in the local cache"):
        load_backbone("someone/pickled", pretrained=True)


def test_error_without_network_says_what_to_do() -> None:
    with pytest.raises(OSError, match=r"timm/resnet10t\.c3_in1k' is not in the local cache.*\n.*pass checkpoint="):
        load_backbone("resnet10t", pretrained=True)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv2_050.no_such_tag"])
def test_model_without_pretrained_weights_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no pretrained weights called '{name}'"):
        load_backbone(name, pretrained=True)


def test_checkpoint_keeps_its_head_unless_num_classes_differs(tmp_path: Path, tiny_backbone: nn.Module) -> None:
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


def test_folder_named_like_a_model_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mobilenetv2_035").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_backbone("mobilenetv2_035", 10).name_or_path == "mobilenetv2_035"


def test_peft_stores_name_or_path() -> None:
    model = get_peft_model(load_backbone("mobilenetv2_035", 10), LoraConfig(target_modules=["conv_head"]))
    assert model.peft_config["default"].base_model_name_or_path == "mobilenetv2_035"


def test_timm_arguments_are_passed_on() -> None:
    assert load_backbone("mobilenetv2_035", 10, in_chans=1).conv_stem.in_channels == 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mobilnetv2_100", "mobilenetv2_100"), ("timm/resnet_18", "resnet18"), ("resnt10t", "resnet10t")],
)
def test_unknown_model_error_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is neither a timm model nor .* nearest are .*\b{nearest}\b"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_model_without_convolutions_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no convolution beyond its patch embedding"):
        load_backbone(name)


def test_contradicting_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        load_backbone("resnet10t", pretrained=True, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found -1"):
        load_backbone("resnet10t", -1)
    with pytest.raises(ValueError, match="nor a Hub id"):
        load_backbone("no/such/folder", pretrained=True)


def test_path_that_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: expected a folder written by save_backbone.* found nothing"):
        load_backbone("resnet10t", checkpoint=tmp_path / "absent")
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"ends in \.safetensors, .*found a file of another kind"):
        load_backbone("resnet10t", checkpoint=tmp_path / "weights.onnx")
    with pytest.raises(FileNotFoundError, match=r"w\.pth: there is no such file"):
        load_backbone("resnet10t", checkpoint=tmp_path / "w.pth")


def test_preprocessing_is_saved_and_can_be_replaced(tmp_path: Path) -> None:
    model = load_backbone("mobilenetv2_035", 10, mean=0.5, std=[0.1, 0.2, 0.3])
    set_preprocessing(model, interpolation="bilinear", crop_pct=0.9, image_size=96)
    save_backbone(model, tmp_path)
    expected = {
        "input_size": (3, 96, 96),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
    }
    read_by_timm = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert {key: read_by_timm[key] for key in expected} == expected
    found = resolve_model_data_config(load_backbone(str(tmp_path), std=0.4, crop_pct=1.0))
    assert {key: found[key] for key in expected} == expected | {"std": (0.4, 0.4, 0.4), "crop_pct": 1.0}
    # Another model of the same architecture keeps timm's values.
    assert load_backbone("mobilenetv2_035").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": 127.5}, "mean: expected one or three numbers .* found 127.5. Divide"),
        ({"mean": [0.5, 0.5]}, r"mean: expected one or three numbers .* found \[0.5, 0.5\]"),
        ({"std": 0}, "std: expected"),
        ({"interpolation": "cubic"}, "interpolation: expected one of nearest, .* found 'cubic'"),
        ({"crop_pct": 0.0}, "crop_pct: expected a number above 0"),
        ({"image_size": 0}, "image_size: expected at least 1"),
        ({"image_size": (32, 0)}, "image_size: expected at least 1"),
        ({"crop_mode": "top"}, "crop_mode: expected one of center, squash, border, found 'top'"),
    ],
)
def test_preprocessing_out_of_range_is_named(values: dict, message: str, tiny_backbone: nn.Module) -> None:
    before = dict(tiny_backbone.pretrained_cfg)
    with pytest.raises(ValueError, match=message):
        set_preprocessing(tiny_backbone, **{"mean": 0.1} | values)
    assert tiny_backbone.pretrained_cfg == before
