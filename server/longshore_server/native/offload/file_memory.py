"""A tier in a file, on persistent memory, NVMe or any disk: written by a thread, read at once.

The file loses its name as soon as it is open, so nothing is left behind however the process ends. A full disk
or a broken file costs units, with one warning, and never raises anything but TierFault.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
import zlib
from pathlib import Path

import torch

from longshore_server.native.errors import ConfigError
from longshore_server.native.offload.memory import TierBusy, TierFault
from longshore_server.native.offload.spec import FIELD

logger = logging.getLogger(__name__)

MAX_WRITES_QUEUED = 64
MAX_QUEUED_BYTES = 256 << 20


class FileMemory:
    """Units at fixed offsets of one preallocated file, each with a checksum kept in memory.

    Raises ConfigError when the file cannot be made. If the disk has no room for it, the tier starts with no
    places and a warning. Of several ranks each has a file of its own beside the first one's.
    """

    reads_can_fail = True

    def __init__(self, path: str, num_bytes: int, unit_bytes: int, *, rank: int = 0) -> None:
        self._unit_bytes = unit_bytes
        self.num_places = num_bytes // unit_bytes
        if self.num_places == 0:
            raise ConfigError(
                FIELD, f"{path}: {num_bytes} bytes are less than one block of {unit_bytes} bytes"
            )
        self._shared = _Shared(path, _open_nameless(path, rank))
        self._close = weakref.finalize(self, _Shared.close, self._shared)
        max_queued = max(1, min(MAX_WRITES_QUEUED, MAX_QUEUED_BYTES // unit_bytes))
        self._shared.jobs = queue.Queue(max_queued)
        self._preallocate()
        threading.Thread(target=self._shared.write_all, name="kv-swap-file", daemon=True).start()

    @property
    def is_writable(self) -> bool:
        return self._shared.is_writable

    def write(self, place: int, unit: torch.Tensor) -> None:
        """Takes a copy of the unit; TierBusy when the disk does not keep up."""
        if not self.is_writable:
            raise TierFault("the file takes no more")
        if self._shared.jobs.full():
            raise TierBusy("the disk does not keep up")
        payload = unit.cpu().numpy().tobytes()
        self._shared.accept(place, payload)
        self._shared.jobs.put((place, payload, place * self._unit_bytes))

    def read(self, place: int) -> torch.Tensor:
        payload = self._shared.read(place, place * self._unit_bytes, self._unit_bytes)
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)

    def flush(self) -> None:
        """Waits until everything taken is in the file, or has failed."""
        self._shared.jobs.join()

    def close(self) -> None:
        self._close()

    def _preallocate(self) -> None:
        try:
            os.posix_fallocate(self._shared.descriptor, 0, self.num_places * self._unit_bytes)
        except OSError as error:
            self.num_places = 0
            self._shared.stop_writing(f"cannot hold {self._unit_bytes} bytes a block: {error.strerror}")


class _Shared:
    """What the engine's thread and the writing thread both touch; it does not know the FileMemory."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_writable = True
        self.jobs: queue.Queue[tuple[int, bytes, int] | None]
        self._path = path
        self._lock = threading.Lock()
        self._queued: dict[int, bytes] = {}
        self._checksums: dict[int, int] = {}

    def accept(self, place: int, payload: bytes) -> None:
        with self._lock:
            self._queued[place] = payload
            self._checksums[place] = zlib.crc32(payload)

    def read(self, place: int, offset: int, num_bytes: int) -> bytes:
        with self._lock:
            queued, checksum = self._queued.get(place), self._checksums.get(place)
        if queued is not None:
            return queued
        if checksum is None:
            raise TierFault("the unit was never written")
        try:
            payload = os.pread(self.descriptor, num_bytes, offset)
        except OSError as error:
            raise TierFault(f"cannot read {self._path}: {error.strerror}") from error
        if zlib.crc32(payload) != checksum:
            raise TierFault(f"{self._path} gives back something else than was written")
        return payload

    def write_all(self) -> None:
        while (job := self.jobs.get()) is not None:
            place, payload, offset = job
            try:
                self._write(place, payload, offset)
            finally:
                self.jobs.task_done()
        self.jobs.task_done()

    def _write(self, place: int, payload: bytes, offset: int) -> None:
        try:
            if not self.is_writable:
                raise OSError(0, "writing has stopped")
            if os.pwrite(self.descriptor, payload, offset) != len(payload):
                raise OSError(0, "the disk is full")
        except OSError as error:
            with self._lock:
                self._checksums.pop(place, None)
            self.stop_writing(error.strerror or "writing failed")
        finally:
            with self._lock:
                if self._queued.get(place) is payload:  # else a newer unit waits for this place
                    del self._queued[place]

    def stop_writing(self, reason: str) -> None:
        if self.is_writable:
            self.is_writable = False
            logger.warning(
                "kv_swap file %s takes no more blocks: %s; they are computed again instead",
                self._path,
                reason,
            )

    def close(self) -> None:
        self.is_writable = False
        self.jobs.put(None)
        self.jobs.join()
        os.close(self.descriptor)


def _open_nameless(path: str, rank: int) -> int:
    """A new file at `path`, open and already without a name; a folder at `path` gets it inside."""
    place = Path(path)
    if place.is_dir():
        place = place / f"longshore-kv-{os.getpid()}-{threading.get_ident()}"
    elif rank:
        place = place.with_name(f"{place.name}.rank{rank}")
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        place.unlink()
    except OSError as error:
        raise ConfigError(FIELD, f"cannot make the file {place}: {error.strerror}") from error
    return descriptor
