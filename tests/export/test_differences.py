from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_edge.backbones import class_names, fingerprint, grow_head, load_backbone, save_backbone, set_class_names
from peft_edge.export.differences import CHECKSUM_KEY, DIFF_KEY, apply_diff, save_result, write_diff
from peft_edge.export.exporter import merge_adapters
from peft_edge.files import unfinished_path
from tests.export.support import Saved


@pytest.fixture(scope="module")
def diff(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("diff") / "diff.safetensors"
    write_diff(load_backbone(str(saved.base)), saved.load(), file)
    return file


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_base_with_diff_equals_the_merged_model_bit_for_bit(saved: Saved, diff: Path, tmp_path: Path) -> None:
    base = load_backbone(str(saved.base))
    before = bits(base)
    result = apply_diff(base, diff)
    save_result(result, tmp_path / "deployed")
    expected = bits(merge_adapters(saved.load()))
    assert bits(result) == expected
    assert bits(load_backbone(str(tmp_path / "deployed"))) == expected
    assert class_names(load_backbone(str(tmp_path / "deployed"))) == [str(digit) for digit in range(10)]
    assert bits(base) == before


def test_diff_contains_only_changed_tensors(saved: Saved, tmp_path: Path) -> None:
    base, model = load_backbone(str(saved.base)), load_backbone(str(saved.base))
    with torch.no_grad():
        model.bn1.bias[0] = -0.0
        base.bn1.bias[0] = 0.0
        model.conv_stem.weight[0, 0, 0, 0] += 1
    changed = write_diff(base, model, tmp_path / "diff.safetensors")
    assert sorted(load_file(tmp_path / "diff.safetensors")) == sorted(changed) == ["bn1.bias", "conv_stem.weight"]
    assert bits(apply_diff(base, tmp_path / "diff.safetensors")) == bits(model)


def test_diff_adds_classes_with_their_names(saved: Saved, tmp_path: Path) -> None:
    base, model = load_backbone(str(saved.base)), load_backbone(str(saved.base))
    grow_head(model, 12)
    set_class_names(model, [*"0123456789", "ten", "eleven"])
    write_diff(base, model, tmp_path / "diff.safetensors")
    result = apply_diff(base, tmp_path / "diff.safetensors")
    assert bits(result) == bits(model)
    assert class_names(result)[-2:] == ["ten", "eleven"]
    assert result.num_classes == 12


def test_diff_is_refused_on_another_base(saved: Saved, diff: Path) -> None:
    other = load_backbone(str(saved.base))
    with torch.no_grad():
        other.bn1.running_mean[3] += 1e-6
    before = bits(other)
    with pytest.raises(ValueError, match=rf"another model: expected the fingerprint \w+, found {fingerprint(other)}"):
        apply_diff(other, diff)
    assert bits(other) == before
    with pytest.raises(ValueError, match="another model"):
        apply_diff(load_backbone("test_resnet", 10), diff)


def test_diff_is_not_applied_twice(saved: Saved, diff: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        apply_diff(apply_diff(load_backbone(str(saved.base)), diff), diff)


def test_diff_between_different_networks_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the adapted model does not fit the base: .*expected no such tensor"):
        write_diff(load_backbone("test_resnet", 10), saved.load(), tmp_path / "diff.safetensors", allow_other_base=True)
    small = load_backbone(str(saved.base), small_images=True)
    with pytest.raises(ValueError, match="the adapted model is another network than the base"):
        write_diff(load_backbone(str(saved.base)), small, tmp_path / "diff.safetensors")
    assert not any(tmp_path.iterdir())


def test_adapter_of_another_base_is_refused_unless_allowed(saved: Saved, tmp_path: Path) -> None:
    other, file = load_backbone(str(saved.base)), tmp_path / "diff.safetensors"
    with torch.no_grad():
        other.conv_stem.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"has another base: conv_stem\.weight differs, 1 of \d+ tensors"):
        write_diff(other, saved.load(), file)
    assert not file.exists()
    write_diff(other, saved.load(), file, allow_other_base=True)
    assert bits(apply_diff(other, file)) == bits(merge_adapters(saved.load()))


Forge = Callable[[dict[str, Tensor], dict[str, Any]], None]


def _set(name: str, tensor: Tensor) -> Forge:
    return lambda tensors, header: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (_set("conv_stem.weight", torch.zeros(1)), r"conv_stem\.weight: expected torch\.float32 .*found .* \(1,\)"),
        (
            _set("bn1.bias", torch.zeros(24, dtype=torch.float64)),
            r"bn1\.bias: expected torch\.float32 .* torch\.float64",
        ),
        (_set("../bn1.bias", torch.zeros(24)), "expected no such tensor"),
        (_set("classifier.weight", torch.zeros(10**12, 0)), r"classifier\.weight: expected .* \(1000000000000, 0\)"),
        (_set("bn1.bias", torch.full((24,), torch.nan)), r"bn1\.bias holds values that are not finite"),
        (_set("bn1.bias", torch.zeros(24)), "the result does not have the fingerprint"),
        (lambda tensors, header: header.update(class_names=["a"]), "expected one for each of the 10 classes"),
        (lambda tensors, header: header.update(class_names=5), "class_names"),
        (lambda tensors, header: header.pop("result"), "result"),
    ],
)
def test_forged_file_is_refused(forge: Forge, message: str, saved: Saved, diff: Path, tmp_path: Path) -> None:
    """The forged files have a valid checksum."""
    tensors, header = load_file(diff), json.loads(metadata_of(diff)[DIFF_KEY])
    forge(tensors, header)
    checksum = hashlib.sha256(json.dumps(header).encode()).hexdigest()
    file = tmp_path / "diff.safetensors"
    save_file(tensors, file, metadata={DIFF_KEY: json.dumps(header), CHECKSUM_KEY: checksum})
    base = load_backbone(str(saved.base))
    before = bits(base)
    with pytest.raises(ValueError, match=message):
        apply_diff(base, file)
    assert bits(base) == before


def test_damaged_file_is_refused_wherever_the_damage_is(saved: Saved, diff: Path, tmp_path: Path) -> None:
    base, whole, file = load_backbone(str(saved.base)), diff.read_bytes(), tmp_path / "diff.safetensors"
    places = torch.randint(len(whole), (20,)).tolist()
    header_size = int.from_bytes(whole[:8], "little")
    for place in [*places, *torch.randint(8 + header_size, (20,)).tolist(), 0, 7]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"diff\.safetensors"):
            apply_diff(base, file)
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="found another or a damaged file"):
            apply_diff(base, file)
    deep = "[" * 100_000
    save_file({}, file, metadata={DIFF_KEY: deep, CHECKSUM_KEY: ""})
    with pytest.raises(ValueError, match="found another or a damaged file"):
        apply_diff(base, file)


def test_missing_file_and_other_files_are_refused(saved: Saved, tmp_path: Path) -> None:
    base = load_backbone(str(saved.base))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing"):
        apply_diff(base, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="expected a file written by peft-edge diff"):
        apply_diff(base, saved.base / "model.safetensors")


def test_save_result_replaces_a_saved_model_in_one_step(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = load_backbone(str(saved.base)), tmp_path / "deployed"
    save_result(model, folder)
    with torch.no_grad():
        model.bn1.bias += 1
    save_result(model, folder)
    assert bits(load_backbone(str(folder))) == bits(model)

    with monkeypatch.context() as patch:
        patch.setattr("peft_edge.export.differences.save_backbone", killed)
        with pytest.raises(KeyboardInterrupt):
            save_result(load_backbone(str(saved.base)), folder)
    assert unfinished_path(folder).exists()
    assert bits(load_backbone(str(folder))) == bits(model)
    save_result(model, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deployed"]

    (folder / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"contains more than a saved model \(photo\.jpg\): name another"):
        save_result(model, folder)
    assert (folder / "photo.jpg").exists()


def killed(model: nn.Module, folder: Path) -> None:
    save_backbone(model, folder)
    raise KeyboardInterrupt
