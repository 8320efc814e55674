"""Ends blocking socket reads at their deadline; knows sockets and time, nothing of what is read."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import socket
import threading
from collections.abc import Callable


class Watch:
    """One blocking read under watch; `fired` says that it was ended for being late."""

    def __init__(self, sock: socket.socket, at_s: float) -> None:
        self.sock: socket.socket | None = sock
        self.at_s = at_s
        self.fired = False


class Watchdog:
    """Ends blocking reads at their deadline by shutting the socket down, on one thread.

    httpx2 has a timeout per read only, which a trickle of bytes never reaches and which can't
    shrink as the deadline nears. `clock` must be the monotonic clock that deadlines are of.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Watch]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def watch(self, sock: socket.socket, at_s: float) -> Watch:
        """Shut `sock` down at `at_s`, unless it is moved or released before."""
        watch = Watch(sock, at_s)
        self._push(watch)
        return watch

    def move(self, watch: Watch, at_s: float) -> None:
        """Another deadline for the same socket."""
        with self._changed:
            watch.at_s = at_s
        self._push(watch)

    def release(self, watch: Watch) -> None:
        """The read is over; the socket may serve another request now."""
        with self._changed:
            watch.sock = None

    def close(self) -> None:
        """End the thread; nothing is watched any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _push(self, watch: Watch) -> None:
        with self._changed:
            heapq.heappush(self._heap, (watch.at_s, next(self._numbers), watch))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="longshore-watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._is_closed:
                while self._heap and self._heap[0][0] <= self._clock():
                    at_s, _, watch = heapq.heappop(self._heap)
                    if watch.at_s == at_s:
                        self._fire(watch)
                wait_s = self._heap[0][0] - self._clock() if self._heap else None
                self._changed.wait(None if wait_s is None else max(wait_s, 0.0))

    @staticmethod
    def _fire(watch: Watch) -> None:
        if watch.sock is None:
            return
        watch.fired = True
        with contextlib.suppress(OSError):  # under TLS too: the socket below, so that a read ends at once
            socket.socket.shutdown(watch.sock, socket.SHUT_RDWR)
