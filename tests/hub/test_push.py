from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from peft_edge import load_backbone, load_pretrained
from peft_edge.backbones import class_names, save_backbone
from peft_edge.hub import push_update
from peft_edge.records import Record
from tests.hub.stand_in import TOKEN, StandIn
from tests.hub.support import adapted

# The HTTP library of the Hub client warns about how the client uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_fingerprint.json",
    "label_names.json",
    "preprocessing.json",
}
SOURCE = {"source_model/config.json", "source_model/model.safetensors"}


@pytest.fixture
def record_file(record: Callable[..., Record], tmp_path: Path) -> Path:
    """Return the path of a record that contains local paths."""
    made = record("lora", 0.75)
    made.train_info.metrics[-1] |= {
        "source test accuracy": 0.5,
        "test accuracy without update": 0.25,
        "source test accuracy without update": 0.875,
    }
    made.run_info.train_config |= {
        "model_id": "test_efficientnet",
        "output_dir": str(tmp_path / "runs" / "mine"),
        "backbone": {"name": "test_efficientnet", "pretrained": False, "checkpoint": str(tmp_path / "start")},
        "data": {
            "name": str(tmp_path / "photos"),
            "shift": "blend",
            "severity": 3,
            "new_classes": [],
            "image_size": 32,
        },
    }
    (tmp_path / "record.json").write_text(made.to_json())
    return tmp_path / "record.json"


@torch.no_grad()
def test_pushed_adapter_loads_with_the_same_logits(hub: StandIn, small_model: PeftModel, batch: Tensor) -> None:
    small_model.push_to_hub("me/adapter")
    assert hub.files("me/adapter").keys() == {".gitattributes", *FILES, *SOURCE}
    reloaded = load_pretrained("me/adapter")
    assert torch.equal(reloaded(batch), small_model(batch))
    assert class_names(reloaded) == ["owl", "été", "9"]
    with small_model.disable_adapter(), reloaded.disable_adapter():
        assert torch.equal(reloaded(batch), small_model(batch))


@torch.no_grad()
def test_adapter_loaded_from_the_hub_can_be_pushed_again(hub: StandIn, small_model: PeftModel, batch: Tensor) -> None:
    small_model.push_to_hub("me/adapter")
    load_pretrained("me/adapter").push_to_hub("you/adapter")
    assert torch.equal(load_pretrained("you/adapter")(batch), small_model(batch))


@torch.no_grad()
def test_adapter_loads_from_a_branch_and_from_a_commit(hub: StandIn, small_model: PeftModel, batch: Tensor) -> None:
    first = small_model(batch)
    small_model.push_to_hub("me/adapter")
    small_model.base_model.model.classifier.modules_to_save["default"].bias += 1
    url = small_model.push_to_hub("me/adapter", revision="v2", private=True)
    assert torch.equal(load_pretrained("me/adapter")(batch), first)
    for revision in ("v2", url.rpartition("/")[2]):
        assert torch.equal(load_pretrained("me/adapter", revision=revision)(batch), small_model(batch))


def test_missing_revision_is_refused(hub: StandIn, small_model: PeftModel) -> None:
    small_model.push_to_hub("me/adapter")
    with pytest.raises(FileNotFoundError, match="me/adapter: expected the folder of an adapter"):
        load_pretrained("me/adapter", revision="v3")


def test_adapter_from_the_hub_cannot_load_a_local_path(hub: StandIn, small_model: PeftModel) -> None:
    small_model.push_to_hub("me/adapter")
    files = {name: content for name, content in hub.files("me/adapter").items() if name not in SOURCE}
    base = small_model.get_base_model().name_or_path
    assert Path(base).is_dir()
    files["adapter_config.json"] = files["adapter_config.json"].replace(b'"me/adapter"', json.dumps(base).encode())
    hub.repos["me/adapter"].commit("main", files)
    with pytest.raises(FileNotFoundError, match=r"/base: expected the backbone of"):
        load_pretrained("me/adapter")


def test_push_deletes_the_backbone_of_an_earlier_push(hub: StandIn, small_model: PeftModel) -> None:
    small_model.push_to_hub("me/adapter")
    base = load_backbone("test_efficientnet", num_classes=3)
    base.name_or_path = "timm/test_efficientnet.r160_in1k"
    adapted(base).push_to_hub("me/adapter")
    assert not SOURCE & hub.files("me/adapter").keys()
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "timm/test_efficientnet.r160_in1k"
    assert "base_model: timm/test_efficientnet.r160_in1k" in hub.files("me/adapter")["README.md"].decode()


@torch.no_grad()
def test_whole_model_is_pushed_in_the_format_of_timm(
    hub: StandIn, tmp_path: Path, record_file: Path, batch: Tensor
) -> None:
    model = load_backbone("test_efficientnet", num_classes=3).eval()
    save_backbone(model, tmp_path / "model")
    push_update(tmp_path / "model", "me/model", record=record_file)
    assert torch.equal(load_backbone("me/model", pretrained=True).eval()(batch), model(batch))
    assert "library_name: timm" in hub.files("me/model")["README.md"].decode()


def test_card_passes_the_validation_of_the_hub_client(hub: StandIn, small_model: PeftModel, record_file: Path) -> None:
    small_model.push_to_hub("me/adapter", record=record_file, license="mit")
    card = ModelCard.load("me/adapter")
    card.validate()
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "image-classification", "mit")
    assert {"peft", "timm", "lora", "image-classification"} <= set(data.tags)
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "test accuracy": 0.75,
        "source test accuracy": 0.5,
    }
    assert 'peft_edge.load_pretrained("me/adapter")' in card.text
    assert "0.250  0.750" in card.text


def test_pushed_files_contain_no_local_path_and_no_token(
    hub: StandIn, small_model: PeftModel, record_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small_model.push_to_hub("me/adapter", record=record_file)
    load_pretrained("me/adapter")
    assert f"Bearer {TOKEN}" in hub.tokens
    pushed = b"\n".join(hub.files("me/adapter").values())
    assert str(tmp_path).encode() not in pushed
    shown = capfd.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*hub.received, *written, pushed, shown.out.encode(), shown.err.encode()):
        assert TOKEN.encode() not in text
    assert Record.from_json(hub.files("me/adapter")["record.json"].decode()).train_info.status == "success"


def test_failed_push_raises_and_changes_nothing(hub: StandIn, small_model: PeftModel) -> None:
    small_model.push_to_hub("me/adapter")
    before = hub.files("me/adapter")
    small_model.base_model.model.classifier.modules_to_save["default"].bias.data += 1
    hub.is_full = True
    with pytest.raises(
        OSError, match=r"me/adapter: expected to push to http.*No file was changed.*push again"
    ) as caught:
        small_model.push_to_hub("me/adapter")
    assert TOKEN not in str(caught.value)
    assert hub.files("me/adapter") == before


def test_upload_is_retried_after_a_cut_connection(hub: StandIn, small_model: PeftModel) -> None:
    hub.interrupt = lambda: None
    small_model.push_to_hub("me/adapter")
    assert hub.files("me/adapter").keys() > FILES


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_push_is_completed_by_a_second_push(hub: StandIn, small_model: PeftModel, batch: Tensor) -> None:
    push = multiprocessing.get_context("fork").Process(target=small_model.push_to_hub, args=("me/adapter",))
    hub.interrupt = lambda: push.kill()
    push.start()
    push.join(timeout=60)
    assert push.exitcode == -signal.SIGKILL
    assert hub.files("me/adapter").keys() == {".gitattributes"}
    small_model.push_to_hub("me/adapter")
    assert torch.equal(load_pretrained("me/adapter")(batch), small_model(batch))


def test_other_adapter_types_are_pushed_by_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("peft_edge.hub.push._peft_push_to_hub", lambda model, repo, **options: called.append(repo))
    base = load_backbone("test_efficientnet", num_classes=3)
    get_peft_model(base, LoraConfig(target_modules=["conv_stem"])).push_to_hub("me/adapter")
    assert called == ["me/adapter"]


def test_importing_the_package_replaces_push_to_hub() -> None:
    code = "import peft_edge, peft; from peft_edge import ConvLoraConfig; print(peft.PeftModel.push_to_hub.__wrapped__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PushToHubMixin.push_to_hub" in result.stdout, result.stderr
