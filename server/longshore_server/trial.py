"""A note that outlives the engine process: which request was on trial when it died.

One small memory-mapped file in the supervisor's private folder. A write reaches the page cache at once, so
the note survives kill -9 of its writer. It judges nothing.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

_NOTE_BYTES = 1024


class TrialNote:
    """The note. `blamed` is what the engine before this one left in it; opening clears it."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _NOTE_BYTES)
            self._map = mmap.mmap(descriptor, _NOTE_BYTES)
        finally:
            os.close(descriptor)
        self.blamed = self._read()
        self.clear()

    def write(self, request_id: str) -> None:
        """Notes that this request is on trial now."""
        text = request_id.encode()[: _NOTE_BYTES - 1]
        self._map[: len(text) + 1] = text + b"\0"

    def clear(self) -> None:
        """Notes that no request is on trial."""
        self._map[0] = 0

    def close(self) -> None:
        """Lets go of the file, which stays."""
        self._map.close()

    def _read(self) -> str:
        return self._map[:].split(b"\0", 1)[0].decode("utf-8", "replace")
