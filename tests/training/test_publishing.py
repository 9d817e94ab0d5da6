from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_edge import load_pretrained
from peft_edge.records import Record
from peft_edge.training import publishing


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked to be pushed; tests/hub shows that a push arrives."""
    calls: list[tuple[Any, ...]] = []

    def push(*where: Any, **options: Any) -> str:
        calls.append((*where, options))
        if len(calls) == 1:
            raise OSError("me/adapter: the line is dead")
        return "https://hub/me/adapter/commit/1"

    monkeypatch.setattr(publishing, "push_update", push)
    return calls


def test_a_run_whose_push_fails_is_complete_and_pushed_by_the_same_command(
    run: Callable[..., Record],
    pushed: list[tuple[Any, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["method=head", "hub.repo_id=me/adapter", "hub.private=true", "hub.license=mit"]
    assert run(tmp_path / "run", *arguments).train_info.status == "success"
    assert "error: me/adapter: the line is dead\nThe run has succeeded. The same command" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "record.json").read_text())["train_info"]["status"] == "success"
    load_pretrained(tmp_path / "run" / "adapter")
    run(tmp_path / "run", *arguments)
    assert "pushed: https://hub/me/adapter/commit/1" in capsys.readouterr().out
    folder, repo_id, options = pushed[1]
    assert (folder, repo_id) == (tmp_path / "run" / "adapter", "me/adapter")
    assert options["record"] == tmp_path / "run" / "record.json"
    assert (options["private"], options["license"], options["revision"]) == (True, "mit", None)


def test_a_finished_run_is_pushed_when_it_is_asked_for_later(
    run: Callable[..., Record], pushed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run(tmp_path / "run", "method=full")
    assert not pushed
    run(tmp_path / "run", "method=full", "hub.repo_id=me/model")
    assert [call[:2] for call in pushed] == [(tmp_path / "run" / "model", "me/model")]
