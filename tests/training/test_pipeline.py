from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_edge import load_pretrained
from peft_edge.allocator import huge_page_state
from peft_edge.backbones import class_names, load_backbone, save_backbone, set_preprocessing
from peft_edge.config import ConfigError, load_config
from peft_edge.data import build_transform, load_configured_task
from peft_edge.methods import METHODS
from peft_edge.records import SUCCESS
from peft_edge.training import evaluation
from peft_edge.training.adaptation import load_update
from peft_edge.training.batches import evaluation_batches
from peft_edge.training.evaluation import eval_logits
from peft_edge.training.pipeline import start_accelerator, start_trackers, torch_settings
from peft_edge.training.source import new_backbone
from tests.hub import stand_in
from tests.training.support import RunTraining, record_of


def test_the_accelerator_has_the_configured_accumulation_and_device() -> None:
    options = ["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]", "training.gradient_accumulation_steps=4"]
    accelerator = start_accelerator(load_config(options))
    assert accelerator.device.type == "cpu"
    assert accelerator.gradient_accumulation_steps == 4


@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_torch_are_those_of_the_run_and_then_those_of_the_caller(fails: bool) -> None:
    threads, is_deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    with suppress(ValueError), torch_settings(threads + 1):
        assert torch.get_num_threads() == threads + 1
        assert torch.backends.cudnn.deterministic
        if fails:
            raise ValueError
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == (threads, is_deterministic)


def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"trackers: wandb is not installed: pip install wandb"):
        start_accelerator(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[wandb]"]))


def test_processes_that_form_no_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start_accelerator(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started and Accelerate sees 1: add --cpu"):
        start_accelerator(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))


def test_a_launcher_that_starts_one_process_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="ignores --num_processes and starts one process"):
        start_accelerator(load_config(["output_dir=a", "data.shift=blend", "--cpu", "trackers=[]"]))


def test_trackers_write_to_the_logs_of_the_run(tmp_path: Path) -> None:
    config = load_config([f"output_dir={tmp_path}", "data.shift=blend", "--cpu"])
    accelerator = start_accelerator(config)
    start_trackers(config, accelerator)
    accelerator.log({"lr_0.01/train loss": 0.5}, step=3)
    accelerator.end_training()
    (event,) = EventAccumulator(str(tmp_path / "logs" / "peft-edge")).Reload().Scalars("lr_0.01/train loss")
    assert (event.step, event.value) == (3, 0.5)


# The Hub's client triggers a warning of its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[stand_in.StandIn]:
    with stand_in.reachable(tmp_path / "hf_home") as server:
        yield server


@pytest.mark.slow
@torch.no_grad()
def test_a_run_whose_push_fails_is_complete_and_the_same_command_pushes_it(
    run: RunTraining,
    hub: stand_in.StandIn,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = ["method=lora", "hub.repo_id=me/adapter", "hub.private=true", "hub.license=mit"]
    hub.is_full = True
    with torch.enable_grad(), pytest.raises(OSError, match=r"me/adapter: expected to push to http(?s:.*)The same comm"):
        run(tmp_path / "run", *arguments)
    failed = capfd.readouterr()
    record = record_of(tmp_path / "run")
    assert record.train_info.status == "success"
    assert "the push to me/adapter failed: me/adapter: expected to push to http" in record.run_info.error_msg
    model = load_pretrained(tmp_path / "run" / "adapter")
    assert set(hub.files("me/adapter")) == {".gitattributes"}

    hub.is_full = False
    run(tmp_path / "run", *arguments)
    pushed = capfd.readouterr()
    assert "pushed: http" in pushed.out
    assert record_of(tmp_path / "run").run_info.error_msg == ""
    assert b"failed" not in hub.files("me/adapter")["record.json"]
    assert hub.repos["me/adapter"].private
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained("me/adapter")(images), model(images))
    card = hub.files("me/adapter")["README.md"].decode()
    assert "license: mit" in card
    assert "adapted from `digits` to blend" in card
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*files, *hub.received, *(part.encode() for part in (*failed, *pushed, caplog.text))):
        assert stand_in.TOKEN.encode() not in text
    for content in hub.files("me/adapter").values():
        assert str(tmp_path).encode() not in content


@torch.no_grad()
def test_a_finished_run_can_be_pushed_later(run: RunTraining, hub: stand_in.StandIn, tmp_path: Path) -> None:
    with torch.enable_grad():
        run(tmp_path / "run", "method=full")
    assert not hub.repos
    run(tmp_path / "run", "method=full", "hub.repo_id=me/model", "hub.revision=v1")
    images = torch.randn(2, 3, 32, 32)
    assert {"model.safetensors", "config.json", "record.json", "README.md"} <= hub.files("me/model", "v1").keys()
    run(tmp_path / "run", "method=full", "hub.repo_id=me/model")
    pushed, local = load_backbone("me/model", pretrained=True), load_backbone(str(tmp_path / "run" / "model"))
    assert torch.equal(pushed.eval()(images), local.eval()(images))


def test_a_run_saves_an_adapter_and_a_record_and_prints_a_table(
    run: RunTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path / "run", "training.learning_rate=[1e-3,1e-2]", "profiling.every_n_steps=1000")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"adapter", "config.yaml", "record.json"}
    train = record.train_info
    assert train.status == SUCCESS
    assert train.file_size == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert [tried["learning_rate"] for tried in train.sweep] == [1e-3, 1e-2]
    # 64 images are 2 steps of 32, and there are 2 epochs.
    assert [entry["step"] for entry in train.metrics] == [2, 4, 4]
    assert train.metrics[-2]["valid accuracy"] == max(tried["valid accuracy"] for tried in train.sweep)
    assert train.checks["reloaded_max_logit_difference"] == 0
    assert train.checks["merged_max_logit_difference"] < 1e-4
    assert [(row.scope, row.lora_rank, row.steps) for row in record.profile] == [("step", 4, 1), ("layers", 4, 1)]
    costs, step = train.costs, record.profile[0]
    assert costs is not None
    assert (costs.step_s, costs.storing_s, costs.statistics_s) == (train.train_time, 0, 0)
    assert costs.total_s == pytest.approx(costs.step_s + costs.loading_s)
    assert costs.flops == 4 * sum(getattr(step, name) for name in vars(step) if name.startswith("flops_"))
    assert costs.process_peak_bytes > 2**28  # Python with torch
    assert record.meta_info.system_info["huge_pages"] == huge_page_state()
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert record.profile[0].adapter_bytes == sum(tensor.nbytes for tensor in saved.values())
    printed = capsys.readouterr().out
    assert f"{train.num_trainable_params:,}" in printed
    assert f"{train.file_size:,}" in printed
    assert f"{train.metrics[-1]['test accuracy']:.3f}" in printed


def test_the_source_model_is_tested_once(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tested, predict = [], evaluation.predict
    monkeypatch.setattr(
        evaluation, "predict", lambda *arguments, **names: tested.append(1) or predict(*arguments, **names)
    )
    options = ["method=none", f"cache_dir={tmp_path / 'cache'}"]
    first = run(tmp_path / "first", *options)
    assert len(tested) == 2  # source and target
    again = run(tmp_path / "again", *options, "training.epochs=3")
    assert len(tested) == 2
    assert again.train_info == first.train_info
    run(tmp_path / "other", *options, "data.shift=invert")
    assert len(tested) == 3  # the other target
    for file in (tmp_path / "cache" / "tests").glob("*.json"):
        file.write_text("{")
    run(tmp_path / "damaged", *options)
    assert len(tested) == 5

    def denied(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(evaluation, "FileLock", denied)
    run(tmp_path / "read-only", *options, "data.shift=grayscale")
    assert len(tested) == 6
    assert "cannot be written, so the next run tests the source model again" in caplog.text


def test_evaluation_can_be_limited_to_the_last_epoch(run: RunTraining, tmp_path: Path) -> None:
    record = run(tmp_path / "run", "method=head", "training.eval_every_epochs=5")
    *epochs, _ = record.train_info.metrics
    first, last = (epoch["valid accuracy"] for epoch in epochs)
    assert first is None
    assert last == record.train_info.sweep[0]["valid accuracy"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_saves_what_it_trained(run: RunTraining, tmp_path: Path, method: str) -> None:
    dense = ["adapter.target_modules=dense"] if method in ("peft-lora", "peft-dora") else []
    record = run(tmp_path / "run", f"method={method}", "training.epochs=1", *dense)
    results, train = record.train_info.metrics[-1], record.train_info
    saved = {path.name for path in (tmp_path / "run").iterdir()} - {"config.yaml", "record.json"}
    if method == "none":
        assert saved == set()
        assert results["test accuracy"] == results["test accuracy without update"]
        assert (results["retention"], results["forgetting"]) == (1, 0)
        return
    assert saved == {"model" if METHODS[method].saves_full_model else "adapter"}
    assert (train.num_trainable_params == train.num_total_params) == METHODS[method].saves_full_model
    assert (train.num_trainable_params == 0) == (method == "norm-stats")
    assert (record.run_info.peft_config is None) == METHODS[method].saves_full_model
    assert train.checks["reloaded_max_logit_difference"] <= 1e-5
    assert results["forgetting"] == results["source test accuracy without update"] - results["source test accuracy"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("adapter.target_modules=[no_such_layer]", "no_such_layer"),
        ("backbone.name=mobilenetv3_smal_050", "mobilenetv3_small_050"),
        ("data.severity=3", "has no severities"),
        ("training.batch_size=65", "there are 64 images to adapt with"),
        ("source.batch_size=9999", "expected at least 2 optimizer steps, found 0"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_trained_and_leaves_no_files(
    run: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, message: str
) -> None:
    monkeypatch.setattr("peft_edge.training.pipeline.source_model", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "runs" / "run", mistake)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_only_prints_its_table(
    run: RunTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "run", "method=none")
    capsys.readouterr()
    monkeypatch.setattr("peft_edge.training.pipeline.load_configured_task", None)
    assert run(tmp_path / "run", "method=none") == first
    assert "holds this run, finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds another run"):
        run(tmp_path / "run", "method=none", "data.shift=invert")
    with pytest.raises(ConfigError, match="holds another run"):
        run(tmp_path / "run", "method=head")


NEW_CLASSES = [
    "data.shift=null",
    "data.new_classes=[7, 8, 9]",
    "data.increments=2",
    "data.rehearsal_size=18",
    "training.batch_size=8",
]


@pytest.mark.parametrize("method", ["lora", "full", "norm-stats", "peft-lokr"])
def test_new_classes_arrive_in_increments(run: RunTraining, tmp_path: Path, method: str) -> None:
    record = run(tmp_path / "run", f"method={method}", *NEW_CLASSES)
    results = record.train_info.metrics[-1]
    assert [len(row) for row in results["accuracies"]] == [1, 2, 3]
    assert [entry["increment"] for entry in record.train_info.sweep] == [1, 2]
    model = load_update(next((tmp_path / "run").glob("*/*.safetensors")).parent, torch.device("cpu")).eval()
    learns = method != "norm-stats"
    assert class_names(model) == [str(digit) for digit in range(10 if learns else 7)]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10 if learns else 7)


def test_without_rehearsal_the_old_rows_of_the_head_do_not_change(run: RunTraining, tmp_path: Path) -> None:
    record = run(tmp_path / "run", "data.shift=null", "data.new_classes=[9]", "method=head", "training.batch_size=8")
    source = load_backbone(record.run_info.peft_config["base_model_name_or_path"])
    head = load_update(tmp_path / "run" / "adapter", torch.device("cpu")).get_base_model().get_classifier()
    assert torch.equal(head.weight[:9], source.classifier.weight)
    assert torch.equal(head.bias[:9], source.classifier.bias)
    # It was drawn from N(0, 0.01²), and then learned.
    assert head.weight[9].norm() > 1.2 * 0.01 * head.in_features**0.5


@pytest.fixture
def photograph_options(tmp_path: Path) -> list[str]:
    """Return the options of a run on images of 44 x 36 pixels.

    The backbone is a saved model with its own preprocessing.
    """
    generator = np.random.default_rng(0)
    for number in range(60):
        for folder in ("photos", "other"):
            file = tmp_path / folder / ("cat", "dog")[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(36, 44, 3), dtype=np.uint8)).save(file)
    model = timm.create_model("test_efficientnet", num_classes=2)
    set_preprocessing(model, mean=0.4, std=0.3, interpolation="bilinear", crop_pct=0.9)
    save_backbone(model, tmp_path / "imported")
    return [
        f"backbone.name={tmp_path / 'imported'}",
        f"data.name={tmp_path / 'photos'}",
        f"data.shift={tmp_path / 'other'}",
        *("data.image_size=24", "data.adaptation_size=null", "source.batch_size=8", "training.batch_size=8"),
        *("source.learning_rate=1e-3", "training.learning_rate=1e-4"),
    ]


@pytest.mark.parametrize("kind", ["digits", "photographs", "whole model"])
def test_timm_prepares_images_as_the_run_did(
    kind: str, run: RunTraining, photograph_options: list[str], tmp_path: Path
) -> None:
    options = photograph_options if kind == "photographs" else []
    options += ["method=full"] if kind == "whole model" else []
    run(tmp_path / "run", *options)
    config = load_config(["--config", str(tmp_path / "run" / "config.yaml")])
    (target,) = load_configured_task(config.data.model_dump(), seed=config.seed).targets
    is_adapter = (tmp_path / "run" / "adapter").exists()
    model = load_pretrained(tmp_path / "run" / "adapter") if is_adapter else load_backbone(str(tmp_path / "run/model"))
    images = next(iter(evaluation_batches(config, new_backbone(config, 2), target.test)))["pixel_values"][:5]
    data_config = timm.data.resolve_model_data_config(model)
    transforms = timm.data.create_transform(**data_config), build_transform(data_config, train=False)
    expected = eval_logits(model, images)
    for transform in transforms:
        found = torch.stack([transform(image.convert("RGB")) for image in target.test[:5]["image"]])
        torch.testing.assert_close(found, images)
        assert torch.equal(eval_logits(model, found).argmax(1), expected.argmax(1))
        torch.testing.assert_close(eval_logits(model, found), expected)
    assert len(class_names(model)) == expected.shape[1]
