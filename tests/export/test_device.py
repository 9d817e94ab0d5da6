"""The exported folder: its files, the split, new classes, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_edge import load_pretrained
from peft_edge.backbones import class_names, fingerprint, load_backbone
from peft_edge.export.device import export_train_step
from peft_edge.export.device_states import import_state
from peft_edge.export.onnx_steps import open_session
from tests.export.support import IMAGE_SIZE, STEP_BATCH_SIZE, adapted, randomize


def test_folder_describes_the_step(step_folder: Path, step_model: PeftModel, device_base: Path) -> None:
    names = {"adapter", "predict.onnx", "state.safetensors", "step.json", "train_step.onnx"}
    assert {path.name for path in step_folder.iterdir()} == names
    description = json.loads((step_folder / "step.json").read_text())
    session = onnxruntime.InferenceSession(step_folder / "train_step.onnx")
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes == {**description["inputs"], **description["adapter"], **description["state"]}
    assert shapes["images"] == [STEP_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE]
    state = load_file(step_folder / "state.safetensors")
    assert {name: list(value.shape) for name, value in state.items()} == {
        **description["adapter"],
        **description["state"],
    }
    outputs = [each.name for each in session.get_outputs()]
    assert outputs == ["loss", "correct", *(f"new:{name}" for name in [*description["adapter"], *description["state"]])]
    assert description["outputs"] == {"loss": [], "correct": []}
    assert [each.name for each in session.get_inputs() if "int64" in each.type] == description["int64"]
    predict = onnxruntime.InferenceSession(step_folder / "predict.onnx")
    images, *rest = predict.get_inputs()
    assert {"images": images.shape} == description["predict"]["inputs"]
    assert {each.name for each in rest} == description["adapter"].keys()
    assert {each.name: each.shape for each in predict.get_outputs()} == description["predict"]["outputs"]
    assert description["prefix"] is None
    for name, entry in description["files"].items():
        content = (step_folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert description["files"].keys() == names - {"adapter", "step.json"}
    assert description["class_names"] == ["bird", "cat", "dog"]
    assert description["base"] == {
        "name": str(device_base),
        "fingerprint": fingerprint(load_backbone(str(device_base))),
    }
    assert description["preprocessing"]["input_size"] == [3, IMAGE_SIZE, IMAGE_SIZE]
    assert description["optimizer"]["momentum"] == 0.9
    checks = description["checks"]
    assert checks["double_difference"] <= 1e-10
    assert 0 < checks["single_difference"] <= checks["allowed_difference"]
    assert checks["peak_rss_bytes"] < 300 * 2**20  # no PyTorch in that process
    assert checks["parameters"] == sum(value.numel() for value in step_model.parameters() if value.requires_grad)


def test_exported_adapter_can_be_exported_again(step_folder: Path, tmp_path: Path) -> None:
    """A folder is loaded as trainable, and the optimizer is part of the step."""
    report = export_train_step(
        step_folder / "adapter",
        tmp_path / "again",
        image_size=IMAGE_SIZE,
        batch_size=2,
        optimizer="adamw",
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    assert report.double_difference <= 1e-10
    state = load_file(tmp_path / "again" / "state.safetensors")
    assert state["step"] == 0
    assert {name.split(":")[0] for name in state if ":" in name} == {"exp_avg", "exp_avg_sq"}


class _Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(device_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "step"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r'norm="stats" in training mode uses batch statistics'):
        export_train_step(adapted(device_base, norm="stats").train(), out, image_size=IMAGE_SIZE)
    with pytest.raises(ValueError, match="pass split=True as well"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, calibration=torch.zeros(1, 3, 32, 32))
    images = torch.zeros(1, 3, 48, 48)
    with pytest.raises(ValueError, match=r"calibration: expected images of 32 x 32 pixels, found \(48, 48\)"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, split=True, calibration=images)
    with pytest.raises(ValueError, match="cannot be split: nothing can be replayed: conv_stem"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, split=True)
    frozen_head = adapted(device_base, modules_to_save=None)
    with pytest.raises(ValueError, match=r"the head classifier is not trained: adapt with modules_to_save=\['class"):
        export_train_step(frozen_head, out, image_size=IMAGE_SIZE, classes=["owl"])
    with pytest.raises(ValueError, match="each name once, found"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, classes=["owl", "owl"])
    with pytest.raises(ValueError, match="the model has one class, so that its loss is always 0"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, classes=["owl"])
    with pytest.raises(ValueError, match="format: expected onnx or executorch, found 'torch-export'"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, format="torch-export")
    with pytest.raises(ValueError, match="calibration: only a prefix in the format onnx is quantised"):
        export_train_step(adapted(device_base), out, image_size=48, calibration=images, split=True, format="executorch")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, batch_size=0)
    with pytest.raises(ValueError, match="expected sgd or adamw, found 'adam'"):
        export_train_step(adapted(device_base), out, image_size=IMAGE_SIZE, optimizer="adam")
    strange = adapted(device_base)
    strange.get_base_model().global_pool.register_module("flatten", nn.Sequential(nn.Flatten(1), _Erf()))
    with pytest.raises(ValueError, match=r"no ONNX operator is known for aten\.erf\.default"):
        export_train_step(strange, out, image_size=IMAGE_SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_step_is_split_from_the_frozen_layers(device_base: Path, tmp_path: Path, quantized: bool) -> None:
    model = randomize(adapted(device_base, target_modules="last-stage"), statistics=False)
    images = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE)
    options = {"split": True, "calibration": images if quantized else None}
    report = export_train_step(model, tmp_path / "step", image_size=IMAGE_SIZE, batch_size=2, **options)
    description = json.loads((tmp_path / "step" / "step.json").read_text())
    start = model.get_base_model().get_submodule(description["prefix"]["start"])
    expected = []
    hook = start.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    with torch.no_grad():
        logits = model(images)
    hook.remove()

    prefix = open_session(tmp_path / "step" / "prefix.onnx")
    (features,) = prefix.run(None, {"images": images.numpy()})
    (only,) = prefix.run(None, {"images": images[:1].numpy()})
    error = (torch.from_numpy(features) - expected[0]).norm() / expected[0].norm()
    state = {name: value.numpy() for name, value in load_file(tmp_path / "step" / "state.safetensors").items()}
    predict = open_session(tmp_path / "step" / "predict.onnx")
    adapter = {name: value for name, value in state.items() if ":" not in name}
    (found,) = predict.run(None, {"images": images.numpy(), **adapter})
    if quantized:
        assert 1e-4 < error < 0.1
        assert report.prefix_error == pytest.approx(error.item(), rel=1e-3)
        floats = tmp_path / "floats"
        export_train_step(model, floats, image_size=IMAGE_SIZE, batch_size=2, split=True)
        sizes = [(folder / "prefix.onnx").stat().st_size for folder in (tmp_path / "step", floats)]
        assert sizes[0] < 0.6 * sizes[1]
        assert (floats / "train_step.onnx").read_bytes() == (tmp_path / "step" / "train_step.onnx").read_bytes()
    else:
        assert report.prefix_error is None
        assert error < 1e-5
        np.testing.assert_allclose(only, features[:1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-5)

    # A step on the features, and the prediction from the images with what was learned.
    session = open_session(tmp_path / "step" / "train_step.onnx")
    batch = {"features": features[:2], "labels": np.array([0, 2]), "mask": np.ones(2, np.float32)}
    rate = {"learning_rate": np.array(0.1, np.float32)}
    outputs = [each.name for each in session.get_outputs()]
    after = dict(zip(outputs, session.run(None, {**state, **batch, **rate}), strict=True))
    assert after["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(torch.from_numpy(found[:2]), torch.tensor([0, 2])).item(), rel=1e-4
    )
    learned = {name: torch.from_numpy(after[f"new:{name}"]) for name in state}
    save_file(learned, tmp_path / "state.safetensors")
    import_state(tmp_path / "step", tmp_path / "state.safetensors", tmp_path / "adapter")
    with torch.no_grad():
        expected_logits = load_pretrained(tmp_path / "adapter")(images)
    (found,) = predict.run(None, {"images": images.numpy(), **{name: learned[name].numpy() for name in adapter}})
    tolerance = 0.1 * expected_logits.abs().max() if quantized else 1e-4
    assert (torch.from_numpy(found) - expected_logits).abs().max() < tolerance


def test_device_learns_new_classes(step_model: PeftModel, device_base: Path, tmp_path: Path) -> None:
    classes = ["dog", "fox", "bird", "hare", "owl"]
    export_train_step(step_model, tmp_path / "step", image_size=IMAGE_SIZE, batch_size=2, classes=classes)
    assert class_names(step_model) == ["bird", "cat", "dog"]
    description = json.loads((tmp_path / "step" / "step.json").read_text())
    assert description["class_names"] == classes
    assert description["predict"]["outputs"] == {"logits": ["batch", 5]}
    assert description["base"]["fingerprint"] == fingerprint(load_backbone(str(device_base)))
    import_state(tmp_path / "step", tmp_path / "step" / "state.safetensors", tmp_path / "adapter")
    loaded = load_pretrained(tmp_path / "adapter")
    assert class_names(loaded.get_base_model()) == classes
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images)[:, [2, 0]], step_model(images)[:, [0, 2]], rtol=1e-4, atol=1e-5)
