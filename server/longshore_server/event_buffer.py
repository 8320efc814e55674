"""A bounded queue between the task that makes events and the one that sends them.

One taker, any number of putters. It holds events and the way the stream ended, and knows nothing of either.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class EventBuffer(Generic[T]):
    """`put` waits while `max_events` are held, so that a slow taker holds up its own stream alone."""

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._events: list[T] = []
        self._error: Exception | None = None
        self._is_closed = False
        self._taker: asyncio.Future[None] | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()

    @property
    def is_over(self) -> bool:
        """True once the stream has ended well and everything was taken."""
        return self._is_closed and self._error is None and not self._events

    async def put(self, event: T) -> None:
        """Add an event, when there is room; after the close it is dropped."""
        while len(self._events) >= self._max_events and not self._is_closed:
            self._has_room.clear()
            await self._has_room.wait()
        if not self._is_closed:
            self._events.append(event)
            self._wake()

    def close(self, error: Exception | None = None, *, discard: bool = False) -> None:
        """End the stream, well or with an error that follows the events held; the first close counts."""
        if self._is_closed:
            return
        self._is_closed, self._error = True, error
        if discard:
            self._events = []
        self._has_room.set()
        self._wake()

    async def take(self, timeout_s: float | None = None) -> list[T]:
        """All events that are there, waiting for the first; none after `timeout_s` or at the end.

        Raises the error that the stream was closed with, once the events before it are taken.
        """
        if not self._events and not self._is_closed:
            await self._wait(timeout_s)
        events, self._events = self._events, []
        self._has_room.set()
        if not events and self._error is not None:
            raise self._error
        return events

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._taker = taker = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake) if timeout_s is not None else None
        try:
            await taker
        finally:
            self._taker = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)
