"""How many requests of a tenant the other HTTP workers of this core have in flight.

Each worker writes one small file and reads those of the others; there is no lock to wait for. Two requests
that come at the same instant at two workers may each be let in as the last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_NUM_ROWS = 2
_NUM_CELLS = 16_384  # per row, 4 bytes each
_FILE_BYTES = _NUM_ROWS * _NUM_CELLS * 4
_CELL = struct.Struct("=I")
_REFRESH_S = 1.0
_PATTERN = "tenants_{pid}.counts"


class PeerCounts:
    """A count-min sketch per worker (Cormode and Muthukrishnan, 2005).

    A tenant has a cell in each row, picked by its hash, and its count is the smallest of them: never too
    small, and too large only where it shares both cells with tenants that are busy at the same time.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._own_path = folder / _PATTERN.format(pid=os.getpid())
        self._own = _open(self._own_path, create=True)
        self._peers: dict[Path, mmap.mmap] = {}
        self._refreshed_s = float("-inf")

    def add(self, tenant: str, change: int) -> None:
        """Tell the others that this worker has `change` more requests of the tenant in flight."""
        for at in _cells(tenant):
            (count,) = _CELL.unpack_from(self._own, at)
            _CELL.pack_into(self._own, at, max(count + change, 0))

    def count(self, tenant: str) -> int:
        """Requests of the tenant in flight at the other workers."""
        if self._clock() - self._refreshed_s > _REFRESH_S:
            self._refresh()
        cells = _cells(tenant)
        return sum(min(_CELL.unpack_from(peer, at)[0] for at in cells) for peer in self._peers.values())

    def close(self) -> None:
        """Take this worker's counts away."""
        self._own_path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        self._refreshed_s = self._clock()
        alive = {path for path in self._folder.glob(_PATTERN.format(pid="*")) if self._is_peer(path)}
        for path in alive - set(self._peers):
            with contextlib.suppress(OSError, ValueError):  # just made, or just gone: next time
                self._peers[path] = _open(path, create=False)
        for path in set(self._peers) - alive:
            self._peers.pop(path).close()

    def _is_peer(self, path: Path) -> bool:
        pid = path.stem.rpartition("_")[2]
        if path == self._own_path or not pid.isdigit():
            return False
        if psutil.pid_exists(int(pid)):
            return True
        path.unlink(missing_ok=True)
        return False


def _cells(tenant: str) -> tuple[int, ...]:
    """The byte offsets of a tenant's cells, one in each row."""
    digest = hashlib.blake2b(tenant.encode(), digest_size=4 * _NUM_ROWS).digest()
    hashes = struct.unpack(f"={_NUM_ROWS}I", digest)
    return tuple((row * _NUM_CELLS + value % _NUM_CELLS) * 4 for row, value in enumerate(hashes))


def _open(path: Path, *, create: bool) -> mmap.mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if create else os.O_RDONLY
    descriptor = os.open(path, flags, 0o600)
    try:
        if create:
            os.ftruncate(descriptor, _FILE_BYTES)
        access = mmap.ACCESS_WRITE if create else mmap.ACCESS_READ
        return mmap.mmap(descriptor, _FILE_BYTES, access=access)
    finally:
        os.close(descriptor)
