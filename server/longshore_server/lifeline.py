"""Ends this process when the one that started it dies, however it dies. Owns nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, *, lifeline_fd: int | None = None) -> None:
    """Makes this process end at once when its parent `parent_pid` ends.

    On Linux the kernel does it (prctl(2), PR_SET_PDEATHSIG). `lifeline_fd` is the read end of a pipe whose
    write end only the parent holds: its end of file is the same news, on any platform.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
    if lifeline_fd is not None:
        threading.Thread(target=_wait_for_end, args=(lifeline_fd,), daemon=True, name="lifeline").start()


def _wait_for_end(lifeline_fd: int) -> None:
    while os.read(lifeline_fd, 4096):
        pass
    os._exit(1)
