from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from peft_edge.backbones import load_backbone
from peft_edge.config import load_config
from peft_edge.data import load_task
from peft_edge.data.sources import read_splits
from peft_edge.lean import feature_cache
from peft_edge.training import batches, loop
from peft_edge.training.batches import augmentation_key, augmentation_of, evaluation_batches, training_batches
from tests.training.support import RunTraining, adapter_of

CONFIG = load_config(["output_dir=a", "data.shift=blend", "data.image_size=32", "training.eval_batch_size=64"])


def pixels(loader) -> Tensor:
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_batches_have_the_given_size_and_leave_the_global_random_state_alone() -> None:
    backbone = load_backbone(CONFIG.backbone.name, num_classes=10)
    target = load_task("digits", shift="invert", image_size=32).targets[0]
    state = torch.get_rng_state()
    trained = pixels(training_batches(CONFIG, backbone, target.train, batch_size=64))
    evaluated = pixels(evaluation_batches(CONFIG, backbone, target.validation))
    assert torch.equal(torch.get_rng_state(), state)
    assert trained.shape == (len(target.train) // 64 * 64, 3, 32, 32)
    assert evaluated.shape == (len(target.validation), 3, 32, 32)
    assert torch.equal(evaluated, pixels(evaluation_batches(CONFIG, backbone, target.validation)))


REPLAY = ["adapter.target_modules=last-stage", "norm=recalibrate", "training.replay=true"]


@pytest.fixture(autouse=True)
def own_features(arguments: list[str], cache: Path, tmp_path: Path) -> None:
    """Use a new cache folder that contains the source models of other tests, but none of their stored features."""
    (cache / "sources").mkdir(exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sources").symlink_to(cache / "sources")
    arguments[arguments.index(f"cache_dir={cache}")] = f"cache_dir={tmp_path / 'cache'}"


def test_replay_with_one_view_per_epoch_equals_training_on_images(
    run: RunTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["training.optimizer=sgd-momentum", *REPLAY[:2]]
    images = run(tmp_path / "images", *plain)
    stored = run(tmp_path / "stored", *plain, "training.replay=true", "training.replay_views=2")
    expected, found = adapter_of(tmp_path / "images"), adapter_of(tmp_path / "stored")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    for one, other in zip(stored.train_info.metrics, images.train_info.metrics, strict=True):
        assert one.get("valid accuracy") == other.get("valid accuracy")
    assert images.train_info.replay is None
    info = stored.train_info.replay
    assert info is not None
    assert (info["images"], info["views"], info["dtype"], info["relative_error"]) == (64, 2, "float32", 0.0)
    # 32 pixels after four strides: 2 x 2 positions of 48 channels, and a label and a scale for each image.
    values = 2 * 2 * 48
    assert 2 * 64 * values * 4 < info["size_bytes"] < 2 * 64 * (values * 4 + 12) + 4000
    assert info["fill_flops"] > 0
    costs = stored.train_info.costs
    assert costs is not None
    assert costs.storing_s == info["fill_s"]
    assert costs.total_s == pytest.approx(costs.step_s + costs.loading_s + costs.storing_s + costs.statistics_s)
    assert min(costs.step_s, costs.loading_s, costs.statistics_s, costs.validation_s) > 0
    assert costs.flops is None  # no step was profiled
    assert "2 stored views of 64 images" in capsys.readouterr().out


def test_an_interrupted_replay_resumes_with_identical_bits(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*REPLAY, "adapter.lora_dropout=0.1", "training.replay_dtype=int8"]
    run(tmp_path / "whole", *options)
    monkeypatch.setattr(feature_cache, "_fill", None)  # every run must use the features that the first one stored
    step, steps = loop._step, []

    def stop_at_the_third(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", *options)
    record = run(tmp_path / "stopped", *options)
    assert 0 < record.train_info.replay["relative_error"] < 0.02
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize("method", ["head", "lora"])
def test_replay_stores_new_and_rehearsed_classes(run: RunTraining, tmp_path: Path, method: str) -> None:
    new = ["data.shift=null", "data.new_classes=[8, 9]", "data.rehearsal_size=16", "training.batch_size=8"]
    record = run(tmp_path / "run", *REPLAY, *new, f"method={method}", "profiling.every_n_steps=9")
    assert record.train_info.checks["reloaded_max_logit_difference"] <= 1e-5
    assert record.train_info.replay["images"] > 16
    saved = adapter_of(tmp_path / "run").values()
    assert record.profile[0].adapter_bytes == sum(tensor.nbytes for tensor in saved)
    assert record.train_info.replay["start"].endswith("blocks.4" if method == "lora" else "classifier")


@pytest.mark.slow
def test_replay_with_lean_layers_gives_the_same_adapter(run: RunTraining, tmp_path: Path) -> None:
    plain = [*REPLAY, "training.optimizer=sgd-momentum"]
    run(tmp_path / "plain", *plain)
    run(tmp_path / "lean", *plain, "lean.enabled=true", "lean.inplace_norm=true")
    expected, found = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "lean")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=full"], "conv_stem is trainable, and no layer comes before it"),
        (["method=norm-stats"], "the model has no trainable parameters"),
        (["norm=stats"], "choose norm=recalibrate or norm=frozen"),
    ],
)
def test_impossible_replay_is_refused_before_the_source_is_trained(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr("peft_edge.training.pipeline.source_model", None)
    with pytest.raises(ValueError, match=rf"training\.replay: nothing can be replayed: .*{message}"):
        run(tmp_path / "run", *REPLAY, *overrides)


@pytest.fixture
def photographs(tmp_path: Path) -> Dataset:
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (200, 128), colour).save(tmp_path / "photos" / name / "1.jpg")
    return read_splits(str(tmp_path / "photos"))["train"]


def test_augmentation_depends_on_the_size_of_the_images(photographs: Dataset) -> None:
    small = photographs.cast_column("image", ImageFeature()).map(
        lambda row: {"image": row["image"].resize((127, 300))}, load_from_cache_file=False
    )
    config = load_config(["output_dir=a", "data.name=photos", "data.shift=blend"])
    assert [augmentation_of(config, images) for images in (photographs, small)] == ["photo", "shift"]
    toys = load_config(["output_dir=a", "data.name=shapes", "data.shift=blend"])
    assert augmentation_of(toys, photographs) == "shift"
    fixed = load_config(["output_dir=a", "data.name=photos", "data.shift=blend", "data.augment=none"])
    assert augmentation_of(fixed, photographs) == "none"
    assert (augmentation_key(config, photographs), augmentation_key(config, small)) == ({"augment": "photo"}, {})


def test_free_cores_load_photographs(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(batches.multiprocessing, "get_start_method", lambda: "fork")
    monkeypatch.setattr(batches.multiprocessing, "parent_process", lambda: None)

    def workers(*options: str, name: str = "photos") -> int:
        config = load_config(["output_dir=a", f"data.name={name}", "data.shift=blend", *options])
        return batches._num_workers(config, photographs)

    assert workers() == 4
    assert workers("num_threads=6") == 2
    assert workers("num_threads=8") == 0
    assert workers("num_workers=7", "num_threads=8") == 7
    assert workers(name="digits") == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers() == 1
    monkeypatch.setattr(batches.multiprocessing, "parent_process", lambda: "a study")
    assert workers() == 0
