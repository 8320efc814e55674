"""A rank as a process whose memories beside the device fail: `python tests/rank_with_faults.py FAULT FD`."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

from longshore_server.native.offload import copies, file_memory
from longshore_server.native.offload.file_memory import FileMemory
from longshore_server.native.offload.memory import TierBusy
from longshore_server.native.ranks import process

STUCK_S = 60.0


def _after(num_calls: int, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """Calls `real` so many times, then every other time."""
    calls = count()

    def call(*arguments: Any) -> Any:
        if (number := next(calls)) >= num_calls and number % 2 == 0:
            raise error
        return real(*arguments)

    return call


def _full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def _read_from_disk() -> None:
    """What is on its way to the disk is read from the disk, too."""

    def accept(shared: Any, place: int, payload: bytes) -> None:
        os.pwrite(shared.descriptor, payload, place * len(payload))
        shared._checksums[place] = file_memory.zlib.crc32(payload)

    file_memory._Shared.accept = accept  # type: ignore[method-assign]


def _full_at_start() -> None:
    file_memory.os.posix_fallocate = _after(0, os.posix_fallocate, _full())


def _full_later() -> None:
    file_memory.os.pwrite = _after(6, os.pwrite, _full())


def _slow() -> None:
    FileMemory.write = _after(2, FileMemory.write, TierBusy("on purpose"))  # type: ignore[method-assign]


def _broken() -> None:
    _read_from_disk()
    file_memory.os.pread = _after(2, os.pread, OSError(errno.EIO, "Input/output error"))


def _short() -> None:
    _read_from_disk()
    real = os.pread
    file_memory.os.pread = lambda number, size, place: real(number, size // 2, place)


def _stuck() -> None:
    _read_from_disk()
    file_memory.os.pread = lambda *_: threading.Event().wait(STUCK_S)


def _no_copy_out() -> None:
    copies.read_units = _after(0, copies.read_units, RuntimeError("on purpose"))


def _no_copy_in() -> None:
    copies.write_units = _after(0, copies.write_units, RuntimeError("on purpose"))


FAULTS: dict[str, Callable[[], None]] = {
    "full at the start": _full_at_start,
    "full later": _full_later,
    "slow": _slow,
    "read errors": _broken,
    "short reads": _short,
    "stuck reads": _stuck,
    "no copy out": _no_copy_out,
    "no copy in": _no_copy_in,
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    process.main()
