"""The line before the one session: first come, first served, with a bound. No I/O, no model."""

from __future__ import annotations

import threading
import time
from collections import deque

from longshore.errors import CancelledError, DeadlineExceededError, QueueFullError

LONGEST_WAIT_S = 3600.0


class Turnstile:
    """Lets one caller at a time through, the others in the order of their coming."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._holder: object | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_taken(self) -> bool:
        return self._holder is not None

    def enter(self, caller: object, is_cancelled: threading.Event, deadline_s: float | None) -> None:
        """Wait for the turn, until `deadline_s` on the monotonic clock.

        Raises QueueFullError at once when the line is full, DeadlineExceededError, and CancelledError after
        `is_cancelled` was set and `nudge` called.
        """
        end_s = time.monotonic() + LONGEST_WAIT_S if deadline_s is None else deadline_s
        with self._changed:
            if self._holder is None and not self._waiting:
                self._holder = caller
                return
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests wait for this device already")
            self._waiting.append(caller)
            try:
                while self._holder is not None or self._waiting[0] is not caller:
                    if is_cancelled.is_set():
                        raise CancelledError("the request was cancelled while it waited")
                    remaining_s = end_s - time.monotonic()
                    if remaining_s <= 0:
                        raise DeadlineExceededError("the time ran out before this device was free")
                    self._changed.wait(remaining_s)
                self._holder = caller
            finally:
                self._waiting.remove(caller)
                self._changed.notify_all()

    def leave(self, caller: object) -> None:
        """Give the turn back; nothing happens if `caller` does not have it."""
        with self._changed:
            if self._holder is caller:
                self._holder = None
                self._changed.notify_all()

    def nudge(self) -> None:
        """Have the waiting callers look whether they were cancelled."""
        with self._changed:
            self._changed.notify_all()
