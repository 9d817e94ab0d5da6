"""Files and folders that are written whole or not at all, and one clear error when the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save says of a failed write, whatever the reason the system gave.
_TORCH_WRITE_ERRORS = ("file write failed", "unexpected pos")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file or folder written there takes its name when the block ends.

    When the block fails, `path` is left as it was. A process that is killed leaves the temporary path, which the next
    attempt clears. A file is the old or the new one at any moment, also when the power fails. A folder that takes the
    place of another is missing for the moment between two renames, and then found beside, as `.<name>.replaced`.

    Raises:
        OSError: The disk is full; the message names `path` and the bytes that are left. Or a file was written where a
            folder is, or a folder where a file is, which stays.
    """
    unfinished = unfinished_path(path)
    remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        unfinished.unlink()
        yield unfinished
        if unfinished.is_dir() and path.is_file():
            raise FileExistsError(f"{path} is a file, and a folder is to be written there: choose another name")
        _flush(unfinished, mode)
        if path.is_dir() and unfinished.is_dir():
            # A folder can only be renamed onto an empty one, so the old one steps aside first.
            replaced = path.with_name(f".{path.name}.replaced")
            remove(replaced)
            path.rename(replaced)
            try:
                unfinished.rename(path)
            except OSError:
                replaced.rename(path)
                raise
            remove(replaced)
        else:
            unfinished.replace(path)
        _flush_folder(path.parent)
    except Exception as error:
        free_bytes = shutil.disk_usage(path.parent).free
        remove(unfinished)
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space to write {path}: {free_bytes:,} bytes are free there. Nothing that was saved before is lost: "
            "free some space and run the same command again",
        ) from error


def _flush(path: Path, mode: int) -> None:
    """Waits until the disk holds what was written: a name that reached it first would be that of an empty file.

    Files get the mode that the system gives new ones; safetensors lets the owner alone read its own.
    """
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_dir():
            _flush_folder(entry)
        else:
            entry.chmod(mode)
            with entry.open("rb+") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere, a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unfinished_path(path: Path) -> Path:
    """Where :func:`atomic_write` lets `path` be written first."""
    return path.with_name(f".{path.name}.unfinished")


def remove(path: Path) -> None:
    """Deletes a file or a folder with all it holds, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files that a pattern with wildcards names, seen from a folder, sorted."""
    path = (folder / pattern).absolute()
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space: a full disk, a quota, or the system's limit on the size of a file."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    # safetensors and torch keep the system's message at most.
    texts = [*map(os.strerror, _NO_SPACE), *_TORCH_WRITE_ERRORS]
    return any(text in str(error) for text in texts)
