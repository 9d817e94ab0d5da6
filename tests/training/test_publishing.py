from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from peft_edge import load_backbone, load_pretrained
from peft_edge.records import Record
from tests.hub import stand_in

# The client uploads in a way of which its own HTTP library warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[stand_in.StandIn]:
    with stand_in.reachable(tmp_path / "hf_home") as server:
        yield server


@pytest.mark.slow
@torch.no_grad()
def test_a_run_whose_push_fails_is_complete_and_pushed_by_the_same_command(
    run: Callable[..., Record], hub: stand_in.StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["method=lora", "hub.repo_id=me/adapter", "hub.private=true", "hub.license=mit"]
    hub.is_full = True
    with torch.enable_grad():
        assert run(tmp_path / "run", *arguments).train_info.status == "success"
    failed = capfd.readouterr()
    assert "error: me/adapter: expected to push to http" in failed.out
    assert "The run has succeeded. The same command" in failed.out
    model = load_pretrained(tmp_path / "run" / "adapter")
    assert set(hub.files("me/adapter")) == {".gitattributes"}

    hub.is_full = False
    run(tmp_path / "run", *arguments)
    pushed = capfd.readouterr()
    assert "pushed: http" in pushed.out
    assert hub.repos["me/adapter"].private
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained("me/adapter")(images), model(images))
    card = hub.files("me/adapter")["README.md"].decode()
    assert "license: mit" in card
    assert "adapted from `digits` to blend" in card
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*files, *hub.received, *(part.encode() for part in (*failed, *pushed))):
        assert stand_in.TOKEN.encode() not in text
    for content in hub.files("me/adapter").values():
        assert str(tmp_path).encode() not in content


@torch.no_grad()
def test_a_finished_run_is_pushed_when_it_is_asked_for_later(
    run: Callable[..., Record], hub: stand_in.StandIn, tmp_path: Path
) -> None:
    with torch.enable_grad():
        run(tmp_path / "run", "method=full")
    assert not hub.repos
    run(tmp_path / "run", "method=full", "hub.repo_id=me/model", "hub.revision=v1")
    images = torch.randn(2, 3, 32, 32)
    assert {"model.safetensors", "config.json", "record.json", "README.md"} <= hub.files("me/model", "v1").keys()
    run(tmp_path / "run", "method=full", "hub.repo_id=me/model")
    pushed, local = load_backbone("me/model", pretrained=True), load_backbone(str(tmp_path / "run" / "model"))
    assert torch.equal(pushed.eval()(images), local.eval()(images))
