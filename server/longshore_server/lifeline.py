"""Ends this process when the one that started it dies, however it dies. Owns nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def _end_now() -> None:
    os._exit(1)


class Lifeline:
    """The tie of a child to its parent.

    On Linux the kernel kills the child at once when its parent dies (prctl(2), PR_SET_PDEATHSIG). `fd` is the
    read end of a pipe whose write end only the parent holds: its end of file calls `on_end`, on any platform,
    and is also how the parent asks for an orderly end.
    """

    def __init__(self, parent_pid: int, fd: int) -> None:
        self.on_end: Callable[[], None] = _end_now
        self._fd = fd
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the line above
            _end_now()
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def _watch(self) -> None:
        while os.read(self._fd, 4096):
            pass
        self.on_end()
