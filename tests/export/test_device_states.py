"""The way back from the states of devices to an adapter of PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_edge import load_pretrained
from peft_edge.export.device import export_train_step
from peft_edge.export.device_states import import_state
from peft_edge.export.train_step import trained_names
from peft_edge.hub import save_adapter
from tests.export.support import IMAGE_SIZE, adapted, randomize


def test_state_comes_home_as_an_adapter(
    step_folder: Path, step_model: PeftModel, trained: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    state = trained(0)
    save_file(state, tmp_path / "state.safetensors", metadata={"device": "board 7", "steps": "2"})
    import_state(step_folder, tmp_path / "state.safetensors", tmp_path / "adapter")
    loaded = load_pretrained(tmp_path / "adapter")
    values = dict(loaded.get_base_model().named_parameters())
    for name, inner in trained_names(step_model).items():
        assert torch.equal(values[inner], state[name])
    images = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE)
    session = onnxruntime.InferenceSession(step_folder / "predict.onnx")
    inputs = {each.name for each in session.get_inputs()} - {"images"}
    (logits,) = session.run(None, {"images": images.numpy(), **{name: state[name].numpy() for name in inputs}})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), loaded(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(step_model(images), loaded(images), atol=1e-3)  # something was learned
        torch.testing.assert_close(loaded.merge_and_unload()(images), torch.from_numpy(logits), rtol=1e-3, atol=1e-4)
    origin = json.loads((tmp_path / "adapter" / "device_training.json").read_text())
    (entry,) = origin["states"]
    assert entry["metadata"] == {"device": "board 7", "steps": "2"}
    assert (entry["file"], entry["weight"]) == ("state.safetensors", 1.0)
    assert entry["sha256"] == hashlib.sha256((tmp_path / "state.safetensors").read_bytes()).hexdigest()
    description = json.loads((step_folder / "step.json").read_text())
    assert {name: origin[name] for name in ("base", "optimizer")} == {
        name: description[name] for name in ("base", "optimizer")
    }


def test_states_of_devices_are_averaged(
    step_folder: Path, trained: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    states, files = [trained(seed) for seed in (1, 2)], [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    import_state(step_folder, files, tmp_path / "adapter", weights=[1, 3])
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in json.loads((step_folder / "step.json").read_text())["adapter"]:
        torch.testing.assert_close(found[name], 0.25 * states[0][name] + 0.75 * states[1][name])
    # The state of the optimizer may stay on the device.
    save_file({name: value for name, value in states[0].items() if not name.startswith("momentum:")}, files[0])
    import_state(step_folder, files[:1], tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in load_file(files[0]).items())


def _without_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(state.items())[1:])


def _changed(name_end: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value(old) if name.endswith(name_end) else old for name, old in state.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {**state, "more": torch.zeros(1)}, "more is unknown"),
        (lambda state: {n: v for n, v in state.items() if n.startswith("momentum")}, "is missing; .* problems in all"),
        (_changed("classifier.bias", lambda old: old[1:]), r"classifier\.bias: expected torch\.float32 \(3,\), found"),
        (_changed("classifier.bias", lambda old: old.double()), r"classifier\.bias: expected torch\.float32"),
        (_changed("classifier.bias", lambda old: old * torch.nan), r"classifier\.bias holds values that are not fin"),
    ],
)
def test_state_that_does_not_fit_is_refused(
    step_folder: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    file = tmp_path / "state.safetensors"
    save_file({n: v.contiguous() for n, v in damage(load_file(step_folder / "state.safetensors")).items()}, file)
    with pytest.raises(ValueError, match=message):
        import_state(step_folder, [step_folder / "state.safetensors", file], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_damaged_files_are_refused(step_folder: Path, tmp_path: Path) -> None:
    state, folder, out = step_folder / "state.safetensors", tmp_path / "step", tmp_path / "adapter"
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors is missing"):
        import_state(step_folder, tmp_path / "nothing.safetensors", out)
    (tmp_path / "cut.safetensors").write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        import_state(step_folder, tmp_path / "cut.safetensors", out)
    with pytest.raises(FileNotFoundError, match=r"step\.json is missing"):
        import_state(tmp_path, state, out)
    shutil.copytree(step_folder, folder)
    (folder / "step.json").write_text('{"format_version": 9}')
    with pytest.raises(ValueError, match="expected format_version 1, found 9"):
        import_state(folder, state, out)
    (folder / "step.json").write_text("{")
    with pytest.raises(ValueError, match=r"step\.json is damaged"):
        import_state(folder, state, out)
    shutil.copy(step_folder / "step.json", folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(FileNotFoundError, match="copy the whole exported folder"):
        import_state(folder, state, out)
    assert not out.exists()


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_do_not_fit_are_refused(step_folder: Path, tmp_path: Path, weights: list[float]) -> None:
    state = step_folder / "state.safetensors"
    with pytest.raises(ValueError, match="weights: expected"):
        import_state(step_folder, [state, state], tmp_path / "adapter", weights=weights)
    with pytest.raises(ValueError, match="expected at least one file"):
        import_state(step_folder, [], tmp_path / "adapter")


def test_adapter_of_low_rank_b_alone_comes_home(device_base: Path, tmp_path: Path) -> None:
    """The frozen A of LoRA-FA is no input of the step, but part of the adapter that comes back."""
    model = randomize(adapted(device_base, freeze_a=True, target_modules="pointwise"), statistics=False)
    save_adapter(model, tmp_path / "before")
    export_train_step(model, tmp_path / "step", image_size=IMAGE_SIZE, batch_size=2)
    assert not any("lora_A" in name for name in load_file(tmp_path / "step" / "state.safetensors"))
    import_state(tmp_path / "step", tmp_path / "step" / "state.safetensors", tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
