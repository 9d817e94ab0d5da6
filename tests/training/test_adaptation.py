from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_edge.backbones import class_names, load_backbone, save_backbone
from peft_edge.config import RunConfig, load_config
from peft_edge.methods import METHODS, Method
from peft_edge.records import DIVERGED
from peft_edge.training.adaptation import continue_update, load_update, new_learner, save_update
from peft_edge.training.loop import DivergedError
from tests.training.support import RunTraining, adapter_of, record_of

METHOD_NAMES = ["head", "norm-affine", "bias", "full", "lora", "conv-adapter", "peft-lora"]
CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 48, 48)


def prepared(model: nn.Module, name: str) -> nn.Module:
    return METHODS[name].prepare(model, options(name))


def options(name: str) -> dict:
    dense = {"target_modules": "dense"} if name == "peft-lora" else {}
    return {**RunConfig(output_dir="", norm="stats").options(METHODS[name].section), **dense}


@pytest.fixture
def source(tmp_path: Path) -> nn.Module:
    save_backbone(load_backbone("test_efficientnet", num_classes=5), tmp_path / "source")
    return load_backbone(str(tmp_path / "source")).to(memory_format=torch.channels_last)


def train_a_little(model: nn.Module) -> torch.Tensor:
    """Take two optimizer steps, and return the logits after them."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(IMAGES).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_saved_update_reloads_unchanged_and_trains_further(source: nn.Module, tmp_path: Path, name: str) -> None:
    model = prepared(load_backbone(str(tmp_path / "source")), name)
    predictions = train_a_little(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    save_update(model, tmp_path / "update", saves_full_model=METHODS[name].saves_full_model)
    (folder,) = (tmp_path / "update").iterdir()
    assert folder.name == ("model" if METHODS[name].saves_full_model else "adapter")
    with torch.no_grad():
        torch.testing.assert_close(load_update(folder, CPU).eval()(IMAGES), predictions, atol=1e-5, rtol=1e-5)

    continued = continue_update(folder, source, METHODS[name], options(name))
    assert {key for key, parameter in continued.named_parameters() if parameter.requires_grad} == trained
    with torch.no_grad():
        torch.testing.assert_close(continued.eval()(IMAGES), predictions, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(train_a_little(continued), predictions, atol=1e-3)


TARGET = SimpleNamespace(num_classes=5, class_names=["a", "b", "c", "d", "e"])


def config_for(method: str, *overrides: str) -> RunConfig:
    return load_config(["output_dir=a", f"method={method}", "data.new_classes=[d, e]", *overrides])


@pytest.fixture
def learner_source() -> nn.Module:
    return load_backbone("test_efficientnet", num_classes=3).eval()


@pytest.mark.parametrize("method", ["head", "full", "lora", "conv-adapter", "peft-loha"])
def test_the_head_grows_and_the_logits_of_old_classes_stay(learner_source: nn.Module, method: str) -> None:
    images = torch.randn(2, 3, 48, 48)
    model = new_learner(config_for(method), METHODS[method], learner_source, TARGET, None).eval()
    torch.testing.assert_close(model(images)[:, :3], learner_source(images), atol=1e-5, rtol=1e-5)
    assert model(images).shape == (2, 5)
    assert class_names(model) == TARGET.class_names
    assert learner_source.num_classes == 3


def test_the_head_does_not_grow_if_nothing_trains(learner_source: nn.Module) -> None:
    assert new_learner(config_for("norm-stats"), METHODS["norm-stats"], learner_source, TARGET, None).num_classes == 3


@pytest.mark.parametrize("rehearses", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_rehearsal_the_old_rows_get_no_gradient(
    learner_source: nn.Module, method: str, rehearses: bool
) -> None:
    config = config_for(method, "data.rehearsal_size=6") if rehearses else config_for(method)
    model = new_learner(config, METHODS[method], learner_source, TARGET, None).train()
    model(torch.randn(4, 3, 48, 48)).square().sum().backward()
    (weight,) = (
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("classifier.weight") or name.endswith("classifier.modules_to_save.default.weight")
    )
    assert (weight.grad[3:] != 0).any()
    assert (weight.grad[:3] != 0).any() == rehearses


def test_warm_up_takes_at_most_half_of_the_steps(
    run: RunTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The default of 10 steps must not refuse a few photographs."""
    run(tmp_path / "half", "training.warmup_steps=2")
    assert "warm-up takes" not in caplog.text
    run(tmp_path / "more", "training.warmup_steps=10")
    assert "warm-up takes 2 instead of 10 steps, because 64 images in batches of 32 make only 4 steps" in caplog.text
    torch.testing.assert_close(adapter_of(tmp_path / "half"), adapter_of(tmp_path / "more"), atol=0, rtol=0)


def test_diverged_training_keeps_and_names_the_last_good_checkpoint(run: RunTraining, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"lr_1000.0 diverged: the loss at step \d .*Lower training.learning_rate"):
        run(tmp_path / "run", "training.learning_rate=1e3", "training.epochs=4")
    record = record_of(tmp_path / "run")
    assert record.train_info.status == DIVERGED
    assert [entry["learning_rate"] for entry in record.train_info.sweep] == [1e3]
    assert "last good checkpoint" in record.run_info.error_msg
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "lr_1000.0").iterdir()
    weights = load_file(checkpoint / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_divergence_in_the_last_step_is_detected(run: RunTraining, tmp_path: Path, method: str) -> None:
    one_step = ["training.batch_size=64", "training.epochs=1", "training.warmup_steps=0"]
    with pytest.raises(DivergedError, match="the loss at step 1 is nan"):
        run(tmp_path / "run", f"method={method}", "training.learning_rate=1e30", *one_step)


def test_fewer_images_than_a_batch_are_refused(run: RunTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size is 128, and there are 64 images to adapt with"):
        run(tmp_path / "run", "training.batch_size=128")


def test_a_method_with_nothing_to_save_is_refused(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mine", Method(prepare=lambda model, options: model))
    with pytest.raises(
        ValueError, match="'mine' returns no PEFT model and is not registered with saves_full_model=True"
    ):
        run(tmp_path / "run", "method=mine")


def test_one_diverged_learning_rate_does_not_end_the_sweep(
    run: RunTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path / "run", "training.learning_rate=[1e3,1e-2]", "training.epochs=4")
    failed, kept = record.train_info.sweep
    assert failed["valid accuracy"] is None
    assert "diverged" in failed["diverged"]
    assert kept["valid accuracy"] == record.train_info.metrics[-2]["valid accuracy"]
    assert "learning rate 1000: diverged" in capsys.readouterr().out
