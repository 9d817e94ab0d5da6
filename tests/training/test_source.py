from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from peft_edge.backbones import fingerprint, load_backbone, save_backbone
from peft_edge.config import RunConfig, load_config
from peft_edge.data import Task, load_task
from peft_edge.files import remove
from peft_edge.training import pipeline, source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("digits", shift="invert", image_size=32)


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return load_config(
        [
            f"output_dir={folder / 'run'}",
            "data.shift=blend",
            "data.image_size=32",
            "source.epochs=1",
            "source.batch_size=350",
            *overrides,
        ]
    )


def test_the_source_model_is_trained_once_and_then_shared(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = source.source_model(config_for(tmp_path), task, CPU)
    assert Path(first.name_or_path).parent == tmp_path / "cache" / "sources"
    assert fingerprint(first) != fingerprint(source.new_backbone(config_for(tmp_path), task.source.num_classes))
    monkeypatch.setattr(source, "_train", None)
    # It depends neither on the method nor on the target.
    again = source.source_model(config_for(tmp_path, "method=full", "training.epochs=3"), task, CPU)
    assert fingerprint(again) == fingerprint(first)
    with pytest.raises(TypeError, match="not callable"):
        source.source_model(config_for(tmp_path, "seed=1"), task, CPU)


def test_weights_of_another_program_and_their_preprocessing_are_saved(tmp_path: Path, task: Task) -> None:
    trained = load_backbone("test_efficientnet", task.source.num_classes)
    renamed = {f"_{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": renamed}, tmp_path / "w.pth")
    options = ["backbone.name=test_efficientnet", f"backbone.checkpoint={tmp_path / 'w.pth'}", "source.epochs=0"]
    found = source.source_model(
        config_for(tmp_path, *options, "backbone.mean=.5", "backbone.std=[.1, .2, .3]"), task, CPU
    )
    assert fingerprint(found) == fingerprint(trained)
    saved = load_backbone(found.name_or_path).pretrained_cfg
    assert (saved["mean"], saved["std"]) == ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    # Other preprocessing is another source model.
    other = source.source_model(config_for(tmp_path, *options, "backbone.mean=.4"), task, CPU)
    assert other.name_or_path != found.name_or_path


def test_errors_in_the_weights_show_before_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_configured_task", None)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    config = config_for(tmp_path, f"backbone.checkpoint={tmp_path / 'w.pth'}", "trackers=[]", "--cpu")
    with pytest.raises(ValueError, match=r"w\.pth"):
        pipeline.run(config)


def test_a_cache_is_read_without_a_lock(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source.source_model(config_for(tmp_path), task, CPU)

    def denied(path: Path) -> None:
        raise PermissionError(f"{path}: a file in a read-only folder")

    monkeypatch.setattr(source, "FileLock", denied)
    assert fingerprint(source.source_model(config_for(tmp_path), task, CPU)) == fingerprint(first)
    with pytest.raises(PermissionError):
        source.source_model(config_for(tmp_path, "seed=1"), task, CPU)


def test_interrupted_source_training_resumes_with_identical_bits(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["source.epochs=2", "source.batch_size=175", "training.checkpoint_every_steps=3"]  # 4 steps per epoch
    whole = source.source_model(config_for(tmp_path / "whole", *options), task, CPU)

    save = source._save_checkpoint

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    config, sources = config_for(tmp_path / "stopped", *options), tmp_path / "stopped" / "cache" / "sources"
    with monkeypatch.context() as patched:
        patched.setattr(source, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            source.source_model(config, task, CPU)
    (checkpoint,) = sources.glob("*.checkpoint")
    assert torch.load(checkpoint, weights_only=True)["step"] == 3
    content = checkpoint.read_bytes()
    starts = []
    load = source._load_checkpoint
    monkeypatch.setattr(source, "_load_checkpoint", lambda *arguments: starts.append(load(*arguments)) or starts[-1])
    assert fingerprint(source.source_model(config, task, CPU)) == fingerprint(whole)
    assert not list(sources.glob("*.checkpoint"))

    remove(next(path for path in sources.iterdir() if path.is_dir()))
    checkpoint.write_bytes(content[: len(content) // 2])
    assert fingerprint(source.source_model(config, task, CPU)) == fingerprint(whole)
    assert starts == [3, 0]
    assert f"{checkpoint} is damaged" in caplog.text


def test_terminated_source_training_saves_its_step(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(source, "_save_checkpoint", lambda file, parts, step, device: saved.append(step))
    previous = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        monkeypatch.setattr(source, "set_epoch", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            source.source_model(config_for(tmp_path), task, CPU)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert saved == [1]


def test_a_new_head_of_loaded_weights_is_said(tmp_path: Path, task: Task) -> None:
    said: list[str] = []
    save_backbone(load_backbone("mobilenetv3_small_050", num_classes=3), tmp_path / "weights")
    options = [f"backbone.checkpoint={tmp_path / 'weights'}", "source.epochs=0"]
    model = source.source_model(config_for(tmp_path, *options), task, CPU, say=said.append)
    assert said == ["new head for 10 classes: the loaded weights have 3 classes"]
    assert model.classifier.out_features == 10
    source.new_backbone(config_for(tmp_path, *options), 3, say=said.append)
    source.new_backbone(config_for(tmp_path), 3, say=said.append)
    assert len(said) == 1


def test_failed_source_training_leaves_nothing_in_the_cache(tmp_path: Path, task: Task) -> None:
    with pytest.raises(ValueError, match=r"the source model diverged in epoch 1 .*: lower source.learning_rate"):
        source.source_model(config_for(tmp_path, "source.learning_rate=1e30"), task, CPU)
    assert [path.suffix for path in (tmp_path / "cache" / "sources").iterdir()] in ([], [".lock"])
