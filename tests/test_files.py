from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_edge.files import atomic_write, requires_extra


def test_file_and_folder_are_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "a.txt") as unfinished:
        unfinished.write_text("a")
    with atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "b.txt").write_text("b")
    assert (tmp_path / "deep" / "a.txt").read_text() == "a"
    assert (tmp_path / "folder" / "b.txt").read_text() == "b"


def test_folder_is_replaced_with_its_contents(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")
    with atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "new.txt").write_text("new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "folder") as unfinished:
        unfinished.write_text("new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(FileExistsError, match="a is a file, but a folder is to be written there"),
        atomic_write(tmp_path / "a") as unfinished,
    ):
        unfinished.mkdir()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_weights_have_the_mode_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").touch()
    with atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        save_file({"a": torch.zeros(2)}, unfinished / "a.safetensors")
    with atomic_write(tmp_path / "b.safetensors") as unfinished:
        save_file({"b": torch.zeros(2)}, unfinished)
    for name in ("folder/a.safetensors", "b.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), atomic_write(tmp_path / "a.txt") as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        raise RuntimeError("stopped")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_leftover_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    killed = """
import os, pathlib, sys
from peft_edge.files import atomic_write, requires_extra
with atomic_write(pathlib.Path(sys.argv[1])) as unfinished:
    unfinished.mkdir()
    (unfinished / "half.txt").write_text("half")
    os.kill(os.getpid(), 9)
"""
    process = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "folder")], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "folder").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "folder").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "folder") as unfinished:
        (unfinished / "inner").mkdir(parents=True)
        (unfinished / "a").write_text("a")
        (unfinished / "inner" / "b").write_text("b")
    entries = [tmp_path / "folder", *(tmp_path / "folder").rglob("*")]
    assert len(entries) == 4
    assert sorted(flushed[:-1]) == sorted((entry.stat().st_ino, False) for entry in entries)
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(400_000)),
        lambda path: save_file({"a": torch.zeros(100_000)}, path),
        lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    ],
    ids=["plain", "safetensors", "torch"],
)
def test_full_disk_is_one_clear_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "a").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no space to write .*a: [\d,]+ bytes are free") as caught:  # noqa: SIM117
            with atomic_write(tmp_path / "a") as unfinished:
                write(unfinished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_comes_back_if_its_replacement_vanishes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")

    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "folder"):
        pass

    assert (tmp_path / "folder" / "old.txt").read_text() == "old"


def test_missing_package_is_named_with_its_extra() -> None:
    with (
        pytest.raises(ImportError, match=r'^no_such_package is not installed: pip install "peft-edge\[train\]"$'),
        requires_extra("train"),
    ):
        import no_such_package.module  # noqa: F401
