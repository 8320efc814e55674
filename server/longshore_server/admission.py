"""Who may go to the engine, and when: lanes, a bounded waiting line, per-key limits. No I/O, no engine.

Its own clock and nothing else: every wait ends in a turn, a typed error or a cancellation.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from longshore.errors import OverloadedError, QueueFullError, RateLimitedError
from longshore.wire import LANES, Lane

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_SMOOTHING = 0.2  # weight of the newest request in the mean time that a slot is held


def priority_of(lane: Lane) -> int:
    """The engine's priority of a lane; smaller is served first."""
    return LANES.index(lane)


@dataclass(order=True, slots=True)
class _Waiter:
    priority: int
    arrival: int
    num_slots: int = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Peers(Protocol):
    """What the other workers of this core have in flight."""

    def count(self, tenant: str) -> int: ...

    def add(self, tenant: str, change: int) -> None: ...


class Admission:
    """Hands out `max_running` slots, one per choice, best lane first and then first come, first served.

    At most `max_waiting` requests wait. When the line is full, a newcomer takes the place of the newest
    waiter of a worse lane, who is told to come back later; otherwise it is refused itself.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_waiting: int,
        max_per_tenant: int,
        peers: Peers | None = None,
        on_waiting: Callable[[int], None] = lambda num_waiting: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_per_tenant = max_per_tenant
        self._peers = peers
        self._on_waiting = on_waiting
        self._clock = clock
        self._num_running = 0
        self._line: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._num_of_tenant: dict[str, int] = {}  # holds tenants with a request in flight only
        self._mean_held_s = 1.0

    @property
    def num_running(self) -> int:
        """Slots handed out."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def num_in_flight(self) -> int:
        """Requests that wait or run."""
        return sum(self._num_of_tenant.values())

    def retry_after_s(self) -> float:
        """How long until a slot is likely to be free for one more request."""
        rounds = (len(self._line) + 1) / self._max_running
        return round(min(max(rounds * self._mean_held_s, _MIN_RETRY_S), _MAX_RETRY_S), 1)

    @asynccontextmanager
    async def slots(self, *, tenant: str, lane: Lane, num_slots: int = 1) -> AsyncIterator[None]:
        """Wait for the turn, hold the slots for the block, give them back.

        Raises RateLimitedError or QueueFullError. Cancelling the wait leaves the line.
        """
        num_slots = min(num_slots, self._max_running)
        self._enter(tenant)
        try:
            await self._turn(lane, num_slots)
            begin_s = self._clock()
            try:
                yield
            finally:
                self._mean_held_s += _SMOOTHING * (self._clock() - begin_s - self._mean_held_s)
                self._num_running -= num_slots
                self._admit_next()
        finally:
            self._leave(tenant)

    def _enter(self, tenant: str) -> None:
        num_here = self._num_of_tenant.get(tenant, 0)
        num_in_flight = num_here + (self._peers.count(tenant) if self._peers is not None else 0)
        if num_in_flight >= self._max_per_tenant:
            raise RateLimitedError(
                f"{num_in_flight} requests of this key are in flight; it may have {self._max_per_tenant}",
                retry_after_s=self.retry_after_s(),
            )
        self._num_of_tenant[tenant] = num_here + 1
        if self._peers is not None:
            self._peers.add(tenant, 1)

    def _leave(self, tenant: str) -> None:
        self._num_of_tenant[tenant] -= 1
        if not self._num_of_tenant[tenant]:
            del self._num_of_tenant[tenant]
        if self._peers is not None:
            self._peers.add(tenant, -1)

    async def _turn(self, lane: Lane, num_slots: int) -> None:
        if not self._line and self._num_running + num_slots <= self._max_running:
            self._num_running += num_slots
            return
        waiter = self._join(priority_of(lane), num_slots)
        self._on_waiting(len(self._line))
        try:
            await waiter.turn
        except BaseException:
            self._give_up(waiter)
            raise
        finally:
            self._on_waiting(len(self._line))

    def _join(self, priority: int, num_slots: int) -> _Waiter:
        if len(self._line) >= self._max_waiting:
            self._make_room(priority)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, next(self._arrivals), num_slots, turn)
        heapq.heappush(self._line, waiter)
        self._admit_next()  # a better lane may fit where the head of the line did not
        return waiter

    def _make_room(self, priority: int) -> None:
        last = max(self._line, default=None)
        if last is None or last.priority <= priority:
            raise self._full()
        self._remove(last)
        if not last.turn.done():
            last.turn.set_exception(self._full())

    def _full(self) -> OverloadedError:
        return QueueFullError(
            f"{self._max_waiting} requests are waiting already", retry_after_s=self.retry_after_s()
        )

    def _admit_next(self) -> None:
        while self._line and self._num_running + self._line[0].num_slots <= self._max_running:
            waiter = heapq.heappop(self._line)
            if not waiter.turn.done():
                self._num_running += waiter.num_slots
                waiter.turn.set_result(None)

    def _give_up(self, waiter: _Waiter) -> None:
        """The waiter was cancelled: leave the line, or hand on the turn that it had just been given."""
        if waiter in self._line:
            self._remove(waiter)
        elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._num_running -= waiter.num_slots
        self._admit_next()

    def _remove(self, waiter: _Waiter) -> None:
        with suppress(ValueError):
            self._line.remove(waiter)
            heapq.heapify(self._line)
