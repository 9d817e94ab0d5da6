"""Weights of other programs: files, wrappers, the match with a timm model, and errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_edge.backbones import fingerprint, import_weights, load_backbone
from peft_edge.backbones.weights import match_weights, read_weights

NAME = "mobilenetv2_035"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Return a network whose tensors all have different values, including those that timm fills with a constant."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=3)
    for tensor in model.state_dict().values():
        tensor.copy_(100 * torch.rand_like(tensor, dtype=torch.float32))
    return model


def renamed(weights: Weights) -> Weights:
    """Return the same tensors under other names, in the style of another program."""
    return {f"_{name.replace('blocks', 'layers')}": tensor for name, tensor in weights.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


WRAPPERS: dict[str, Callable[[Weights], object]] = {
    "plain.pth": lambda weights: weights,
    "timm.pth.tar": lambda weights: {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "DataParallel.pt": lambda weights: {"model": prefixed("module.", weights)},
    "compiled.bin": lambda weights: prefixed("_orig_mod.", weights),
    "Lightning.ckpt": lambda weights: {"state_dict": prefixed("net.model.", weights)},
    "other.ckpt": lambda weights: {"params": weights, "step": 7},
    "EMA.pth": lambda weights: {
        "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        "model_ema": {"n_averaged": torch.tensor(4), **prefixed("module.", weights)},
    },
}


@pytest.mark.parametrize("file_name", WRAPPERS)
@pytest.mark.parametrize("rename", [dict, renamed], ids=["names", "order"])
def test_weights_are_found_in_common_wrappers(
    file_name: str, rename: Callable[[Weights], Weights], trained: nn.Module, tmp_path: Path
) -> None:
    weights = rename(trained.state_dict())
    torch.save(WRAPPERS[file_name](weights), tmp_path / file_name)
    model = timm.create_model(NAME)
    match = import_weights(model, tmp_path / file_name)
    assert fingerprint(model) == fingerprint(trained)
    assert (match.is_by_name, match.num_classes, len(match.names)) == (rename is dict, 3, len(trained.state_dict()))
    assert fingerprint(load_backbone(NAME, checkpoint=tmp_path / file_name)) == fingerprint(trained)


def test_safetensors_are_matched_by_name_only(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    assert list(read_weights(tmp_path / "w.safetensors")) != list(trained.state_dict())  # sorted by name
    model = timm.create_model(NAME)
    assert import_weights(model, tmp_path / "w.safetensors").is_by_name
    assert fingerprint(model) == fingerprint(trained)
    save_file(renamed(trained.state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"lacks 314 tensors \(blocks.* has 314 others \(_bn1.* import a \.pth file"):
        import_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("rename", [dict, renamed], ids=["names", "order"])
def test_head_and_counters_may_be_missing(
    rename: Callable[[Weights], Weights], trained: nn.Module, tmp_path: Path
) -> None:
    missing = ("classifier.weight", "classifier.bias", "num_batches_tracked")
    headless = {name: tensor for name, tensor in trained.state_dict().items() if not name.endswith(missing)}
    torch.save(rename(headless), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="has no head: pass num_classes"):
        load_backbone(NAME, checkpoint=tmp_path / "w.pth")
    model = load_backbone(NAME, 5, checkpoint=tmp_path / "w.pth")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in headless.items())
    assert model.num_classes == 5
    assert "no head" in str(match_weights(model, headless, source="w.pth"))


def test_match_by_order_is_reported_once(trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(renamed(trained.state_dict()), tmp_path / "w.pth")
    for _ in range(2):
        load_backbone(NAME, 7, checkpoint=tmp_path / "w.pth")
    expected = (
        f"{tmp_path / 'w.pth'}: matched all 314 tensors by order and shape (_conv_stem.weight -> conv_stem.weight, "
        "..., _classifier.bias -> classifier.bias); the file has a head for 3 classes"
    )
    assert caplog.messages == [expected]


def changed(weights: Weights, change: str) -> Weights:
    """Return renamed weights that contain one mistake. `change` chooses the mistake."""
    found = renamed(weights)
    if change == "shape":
        found["_bn1.weight"] = torch.ones(5)
    elif change == "missing":
        del found["_bn1.weight"]
    elif change == "extra":
        found["_loss.weight"] = torch.ones(5)
    elif change == "kinds":  # weight and bias of a norm have the same shape
        names = list(found)
        first = names.index("_bn1.weight")
        names[first : first + 2] = reversed(names[first : first + 2])
        found = {name: found[name] for name in names}
    elif change == "names":  # two tensors of the same shape, under the name of the other
        swapped = {"_bn1.weight": "blocks.0.0.bn1.weight", "_layers.0.0.bn1.weight": "bn1.weight"}
        found = {swapped.get(name, name): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"bn1.weight has shape \(16,\), and its counterpart _bn1.weight has shape \(5,\)"),
        ("missing", "by order, because the names differ, the first difference is: bn1.weight .* _bn1.bias"),
        ("extra", "the model has 314 tensors and the file has 315"),
        ("kinds", r"bn1.weight has shape \(16,\), and its counterpart _bn1.bias"),
        ("names", r"bn1.weight .* counterpart blocks.0.0.bn1.weight"),
    ],
)
def test_order_that_does_not_fit_is_refused_and_nothing_changes(
    change: str, message: str, trained: nn.Module, tmp_path: Path
) -> None:
    torch.save(changed(trained.state_dict(), change), tmp_path / "w.pth")
    model = timm.create_model(NAME)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"w.pth does not fit {NAME}. .*{message}"):
        import_weights(model, tmp_path / "w.pth")
    assert fingerprint(model) == before


def test_most_names_fit_but_not_all(trained: nn.Module, tmp_path: Path) -> None:
    weights = trained.state_dict()
    weights["extra.weight"] = weights.pop("bn1.bias")
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(bn1.bias\), and has 1 others \(extra.weight\)"):
        import_weights(timm.create_model(NAME), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet10t"])
def test_weights_of_another_network_are_refused(name: str, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"does not fit {name}"):
        load_backbone(name, checkpoint=tmp_path / "w.pth")


class Harmful:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_pickled_code_does_not_run(trained: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": trained.state_dict(), "extra": Harmful(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"found .*pathlib.*Path.*, which PyTorch does not read safely"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="load it in the program that wrote it"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("file_name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", None], ids=["empty", "text", "truncated"])
def test_damaged_file_is_named(file_name: str, content: bytes | None, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / file_name
    if file_name == "w.pth":
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(ValueError, match=f"{file_name}: expected weights, found a damaged file"):
        read_weights(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"state_dict": {"a": 1}}, [torch.ones(2)], torch.ones(2)])
def test_file_without_a_state_dict_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: expected"):
        read_weights(tmp_path / "w.pth")


def test_path_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").touch()
    problems = {"absent.pth": "no such file", "w.onnx": "found a file of another kind", ".": "found a folder"}
    for name, problem in problems.items():
        with pytest.raises(FileNotFoundError, match=problem):
            read_weights(tmp_path / name)
