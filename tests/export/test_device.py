"""The exported folder: its files, its proofs, what it refuses, and the way back to an adapter of PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_edge import ConvLoraConfig, load_pretrained
from peft_edge.backbones import fingerprint, load_backbone, save_backbone, set_class_names
from peft_edge.export import device
from peft_edge.export.device import export_train_step, import_state
from peft_edge.export.onnx_graph import write_onnx_graph
from peft_edge.export.onnx_steps import run_steps
from peft_edge.export.train_step import StepOptimizer, TrainStep, trained_names
from peft_edge.hub import save_adapter
from tests.export.support import randomize

SIZE, BATCH_SIZE = 32, 4


def adapted(base: Path, **options: object) -> PeftModel:
    config = {"r": 2, "target_modules": "dense", "norm": "frozen", "modules_to_save": ["classifier"], **options}
    return get_peft_model(load_backbone(str(base)), ConvLoraConfig(**config)).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("device") / "base"
    network = load_backbone("test_efficientnet", 3)
    set_class_names(network, ["bird", "cat", "dog"])
    save_backbone(network, folder)
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> PeftModel:
    torch.manual_seed(1)
    return randomize(adapted(base), statistics=False)


@pytest.fixture(scope="module")
def exported(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "step"
    export_train_step(model, folder, image_size=SIZE, batch_size=BATCH_SIZE)
    return folder


@pytest.fixture
def trained(exported: Path) -> Callable[[int], dict[str, Tensor]]:
    """Takes steps in ONNX Runtime on images of a seed, and returns the state."""

    def train(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        batches = {"learning_rate": torch.tensor(0.05).numpy()}
        for index in range(2):
            batches[f"images.{index}"] = torch.randn(BATCH_SIZE, 3, SIZE, SIZE).numpy()
            batches[f"labels.{index}"] = torch.randint(3, (BATCH_SIZE,)).numpy()
            batches[f"mask.{index}"] = torch.ones(BATCH_SIZE).numpy()
        found = run_steps(exported, batches)
        return {name: torch.from_numpy(found[name]) for name in load_file(exported / "state.safetensors")}

    return train


def test_folder_describes_the_step(exported: Path, model: PeftModel, base: Path) -> None:
    names = {"adapter", "predict.onnx", "state.safetensors", "step.json", "train_step.onnx"}
    assert {path.name for path in exported.iterdir()} == names
    description = json.loads((exported / "step.json").read_text())
    session = onnxruntime.InferenceSession(exported / "train_step.onnx")
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes == {**description["inputs"], **description["adapter"], **description["state"]}
    assert shapes["images"] == [BATCH_SIZE, 3, SIZE, SIZE]
    state = load_file(exported / "state.safetensors")
    assert {name: list(value.shape) for name, value in state.items()} == {
        **description["adapter"],
        **description["state"],
    }
    outputs = [each.name for each in session.get_outputs()]
    assert outputs == ["loss", "correct", *(f"new:{name}" for name in [*description["adapter"], *description["state"]])]
    assert description["class_names"] == ["bird", "cat", "dog"]
    assert description["base"] == {"name": str(base), "fingerprint": fingerprint(load_backbone(str(base)))}
    assert description["preprocessing"]["input_size"] == [3, SIZE, SIZE]
    assert description["optimizer"]["momentum"] == 0.9
    checks = description["checks"]
    assert checks["double_difference"] <= 1e-10
    assert 0 < checks["single_difference"] <= checks["allowed_difference"]
    assert checks["peak_rss_bytes"] < 300 * 2**20  # no PyTorch in that process
    assert checks["parameters"] == sum(value.numel() for value in model.parameters() if value.requires_grad)


def test_exported_adapter_can_be_exported_again(exported: Path, tmp_path: Path) -> None:
    """A folder is loaded as trainable, and the optimizer is part of the step."""
    report = export_train_step(
        exported / "adapter",
        tmp_path / "again",
        image_size=SIZE,
        batch_size=2,
        optimizer="adamw",
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    assert report.double_difference <= 1e-10
    state = load_file(tmp_path / "again" / "state.safetensors")
    assert state["step"] == 0
    assert {name.split(":")[0] for name in state if ":" in name} == {"exp_avg", "exp_avg_sq"}


def test_state_comes_home_as_an_adapter(
    exported: Path, model: PeftModel, trained: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    state = trained(0)
    save_file(state, tmp_path / "state.safetensors")
    import_state(exported, tmp_path / "state.safetensors", tmp_path / "adapter")
    loaded = load_pretrained(tmp_path / "adapter")
    values = dict(loaded.get_base_model().named_parameters())
    for name, inner in trained_names(model).items():
        assert torch.equal(values[inner], state[name])
    images = torch.randn(5, 3, SIZE, SIZE)
    session = onnxruntime.InferenceSession(exported / "predict.onnx")
    inputs = {each.name for each in session.get_inputs()} - {"images"}
    (logits,) = session.run(None, {"images": images.numpy(), **{name: state[name].numpy() for name in inputs}})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), loaded(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images), loaded(images), atol=1e-3)  # something was learned
        torch.testing.assert_close(loaded.merge_and_unload()(images), torch.from_numpy(logits), rtol=1e-3, atol=1e-4)
    origin = json.loads((tmp_path / "adapter" / "device_training.json").read_text())
    assert [each["weight"] for each in origin["states"]] == [1.0]


def test_states_of_devices_are_averaged(
    exported: Path, trained: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    states, files = [trained(seed) for seed in (1, 2)], [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    import_state(exported, files, tmp_path / "adapter", weights=[1, 3])
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in json.loads((exported / "step.json").read_text())["adapter"]:
        torch.testing.assert_close(found[name], 0.25 * states[0][name] + 0.75 * states[1][name])
    # The state of the optimizer may stay on the device.
    save_file({name: value for name, value in states[0].items() if not name.startswith("momentum:")}, files[0])
    import_state(exported, files[:1], tmp_path / "adapter")
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
    exported: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    file = tmp_path / "state.safetensors"
    save_file({n: v.contiguous() for n, v in damage(load_file(exported / "state.safetensors")).items()}, file)
    with pytest.raises(ValueError, match=message):
        import_state(exported, [exported / "state.safetensors", file], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_damaged_files_are_refused(exported: Path, tmp_path: Path) -> None:
    state, folder, out = exported / "state.safetensors", tmp_path / "step", tmp_path / "adapter"
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors is missing"):
        import_state(exported, tmp_path / "nothing.safetensors", out)
    (tmp_path / "cut.safetensors").write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        import_state(exported, tmp_path / "cut.safetensors", out)
    with pytest.raises(FileNotFoundError, match=r"step\.json is missing"):
        import_state(tmp_path, state, out)
    shutil.copytree(exported, folder)
    (folder / "step.json").write_text('{"format_version": 9}')
    with pytest.raises(ValueError, match="expected format_version 1, found 9"):
        import_state(folder, state, out)
    (folder / "step.json").write_text("{")
    with pytest.raises(ValueError, match=r"step\.json is damaged"):
        import_state(folder, state, out)
    shutil.copy(exported / "step.json", folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(FileNotFoundError, match="copy the whole exported folder"):
        import_state(folder, state, out)
    assert not out.exists()


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_do_not_fit_are_refused(exported: Path, tmp_path: Path, weights: list[float]) -> None:
    state = exported / "state.safetensors"
    with pytest.raises(ValueError, match="weights: expected"):
        import_state(exported, [state, state], tmp_path / "adapter", weights=weights)
    with pytest.raises(ValueError, match="expected at least one file"):
        import_state(exported, [], tmp_path / "adapter")


class _Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "step"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r'norm="stats" trains on batch statistics'):
        export_train_step(adapted(base, norm="stats"), out, image_size=SIZE)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        export_train_step(adapted(base), out, image_size=SIZE, batch_size=0)
    with pytest.raises(ValueError, match="expected sgd or adamw, found 'adam'"):
        export_train_step(adapted(base), out, image_size=SIZE, optimizer="adam")
    strange = adapted(base)
    strange.get_base_model().global_pool.register_module("flatten", nn.Sequential(nn.Flatten(1), _Erf()))
    with pytest.raises(ValueError, match=r"no ONNX operator is known for aten\.erf\.default"):
        export_train_step(strange, out, image_size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("wrong", ["graph", "file", "prediction"])
def test_step_that_computes_something_else_is_not_kept(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    capture = device.capture_train_step

    def captured(model: PeftModel, images: Tensor, optimizer: StepOptimizer) -> TrainStep:
        step = capture(model, images, optimizer)
        if wrong == "graph":
            _scale_largest(step.step.module)
        return step

    def written(graph: object, **options: object) -> object:
        if wrong == ("prediction" if options["any_batch_size"] else "file"):
            _scale_largest(graph.module)
        return write_onnx_graph(graph, **options)

    monkeypatch.setattr(device, "capture_train_step", captured)
    monkeypatch.setattr(device, "write_onnx_graph", written)
    message = {
        "graph": r"eager training in double precision within 1e-10, found a difference of \d",
        "file": r"train_step\.onnx: expected the .* found",
        "prediction": r"predict\.onnx: expected the logits .* found a difference of \d",
    }[wrong]
    with pytest.raises(ValueError, match=message):
        export_train_step(model, tmp_path / "step", image_size=SIZE, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def _scale_largest(module: nn.Module) -> None:
    """Changes the largest constant of a graph."""
    max(module.buffers(), key=Tensor.numel).mul_(3)


def test_run_that_dies_is_an_error(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "step")
    (tmp_path / "step" / "train_step.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"could not run the training step \(exit code 1\): .*[Pp]rotobuf"):
        device._run_steps(tmp_path / "step", [], 0.1)


def test_adapter_of_low_rank_b_alone_comes_home(base: Path, tmp_path: Path) -> None:
    """The frozen A of LoRA-FA is no input of the step, but part of the adapter that comes back."""
    model = randomize(adapted(base, freeze_a=True, target_modules="pointwise"), statistics=False)
    save_adapter(model, tmp_path / "before")
    export_train_step(model, tmp_path / "step", image_size=SIZE, batch_size=2)
    assert not any("lora_A" in name for name in load_file(tmp_path / "step" / "state.safetensors"))
    import_state(tmp_path / "step", tmp_path / "step" / "state.safetensors", tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
