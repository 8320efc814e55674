"""Files and folders of a store on the disk: opened without following links, written so that they last."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longshore.errors import BundleDamagedError

INCOMING_PREFIX = ".incoming-"
LOCK_WAIT_S = 30.0
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


def open_plain(folder: Path, path: str) -> BinaryIO:
    """Open a plain file below `folder`; no link on the way is followed, no second name allowed."""
    whole = folder
    for part in path.split("/")[:-1]:
        whole = whole / part
        if whole.is_symlink():
            raise BundleDamagedError(f"{path} lies behind a symbolic link")
    target = folder / path
    try:
        if target.is_symlink():
            raise BundleDamagedError(f"{path} is a symbolic link")
        stream = os.fdopen(os.open(target, _OPEN_FLAGS), "rb")
    except FileNotFoundError:
        raise BundleDamagedError(f"{path} is missing") from None
    except OSError as error:
        raise BundleDamagedError(f"{path} can't be read: {error.strerror}") from None
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        stream.close()
        is_linked = stat.S_ISREG(status.st_mode)
        raise BundleDamagedError(f"{path} is " + ("a hard link" if is_linked else "not a plain file"))
    return stream


def write_file(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with path.open("xb") as stream:
        stream.write(data)
        flush(stream)


def replace_file(path: Path, data: bytes) -> None:
    """The file's new content in one step; a reader sees the old or the new."""
    fresh = path.with_name(f"{INCOMING_PREFIX}{secrets.token_hex(8)}")
    try:
        write_file(fresh, data)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush(stream: BinaryIO) -> None:
    """Bring a file's bytes onto the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` last; not every system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file; OSError after LOCK_WAIT_S. The lock ends with the process."""
    with path.open("ab") as lock:
        _lock(lock)
        yield


def _lock(lock: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock on this system: installs there are the caller's to put in order
        return
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() >= deadline_s:
                raise
        time.sleep(0.05)
