"""Files that are whole after a crash and shared between processes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, flush to the disk, then rename, so that a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask gives, which some libraries do not ask
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk has no name
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError naming ``path`` if no file can be written there."""
    try:
        if path.exists() and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is a folder" if path.is_dir() else "it is no regular file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make the folder ``path`` and those above it, unless they are there; OSError names it where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"no folder can be made at {path}: {error.strerror}") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of ``path``, whose folder is made if needed. Without ``wait``, BlockingIOError if another does."""
    make_folder(path.parent)
    check_writable(path)  # or the lock would be waited for in vain
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire(-1 if wait else 0)
    except Timeout:
        raise BlockingIOError(f"{path} is being written by another process") from None
    with lock:
        yield
