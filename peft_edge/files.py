"""Write files completely or not at all, and explain a full disk or a missing package."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Parts of the error messages of torch.save for failed writes. The messages do not state why a write failed.
_TORCH_WRITE_ERRORS = ("file write failed", "unexpected pos")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the block to write to. After the block, rename the written file or folder to `path`.

    The temporary path is in the same folder as `path`. If the block fails, `path` is unchanged. If the process is
    killed, the temporary file remains until the next call for `path` deletes it. If `path` is a file, it always has
    either its old or its new content, even after a power cut. Replacing a folder by a folder takes two renames. If the
    process is killed between the two renames, `path` is missing, and the old folder is at `.<name>.replaced`.

    Raises:
        OSError: If the disk is full, if a file would replace a folder, or if a folder would replace a file.
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
            raise FileExistsError(f"{path} is a file, but a folder is to be written there: choose another name")
        _flush(unfinished, mode)
        if path.is_dir() and unfinished.is_dir():
            # A rename cannot replace a folder that is not empty, so the old folder is moved away first.
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
    """Set `mode` on the file `path`, or on all files in the folder `path`, and write them to the disk with `fsync`.

    Without `fsync`, a power cut after the rename may leave empty files.
    """
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_dir():
            _flush_folder(entry)
        else:
            entry.chmod(mode)  # safetensors creates files that only their owner can read
            with entry.open("rb+") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unfinished_path(path: Path) -> Path:
    """Return the temporary path that `atomic_write(path)` uses."""
    return path.with_name(f".{path.name}.unfinished")


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files and folders that match a glob pattern, sorted. A relative pattern starts at `folder`."""
    path = (folder / pattern).absolute()
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` comes from a write to a full disk, beyond a quota, or beyond a file size limit.

    The result is True for every failed write of torch.save, because the messages of torch.save do not state the cause.
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    # Write errors of safetensors and torch have no `errno`, so compare their messages.
    texts = [*map(os.strerror, _NO_SPACE), *_TORCH_WRITE_ERRORS]
    return any(text in str(error) for text in texts)


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """If an import in the block fails, raise an error that says how to install the missing package.

    `extra` is the name of the extra of peft-edge that contains the package, such as `onnx`.

    Raises:
        ImportError: If a package that the block imports is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "peft-edge[{extra}]"') from error
