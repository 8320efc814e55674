"""Streams into the cache and out of it: one passes an answer on and keeps it, the other sends a kept one.

What is kept, and under which key, is the relay's.
"""

from __future__ import annotations

from collections.abc import Callable

from longshore_edge.answers import StreamAnswer


class ReplayedStream:
    """A stored stream, sent again as one block."""

    is_cacheable = False
    num_tokens = 0

    def __init__(self, block: bytes) -> None:
        self._block: bytes | None = block

    async def next_block(self) -> bytes | None:
        """The block once, then None."""
        block, self._block = self._block, None
        return block

    async def close(self) -> None:
        """Nothing is held."""


class RecordedStream:
    """Passes a stream on, and hands its blocks to `store` at its true end if they are within `max_bytes`.

    `on_close` is called once, however the stream ends.
    """

    is_cacheable = False

    def __init__(
        self,
        inner: StreamAnswer,
        store: Callable[[list[bytes]], None],
        max_bytes: int,
        on_close: Callable[[], None] | None,
    ) -> None:
        self._inner = inner
        self._store = store
        self._max_bytes = max_bytes
        self._on_close = on_close
        self._blocks: list[bytes] | None = [] if inner.is_cacheable else None
        self._size_bytes = 0
        self._is_open = True

    @property
    def num_tokens(self) -> int:
        """Token chunks passed on."""
        return self._inner.num_tokens

    async def next_block(self) -> bytes | None:
        """The inner stream's next block."""
        block = await self._inner.next_block()
        if block is not None:
            self._keep(block)
        elif self._blocks is not None:
            self._store(self._blocks)
            self._blocks = None
        return block

    async def close(self) -> None:
        """Close the inner stream and say so. Safe to call again."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            await self._inner.close()
        finally:
            if self._on_close is not None:
                self._on_close()

    def _keep(self, block: bytes) -> None:
        if self._blocks is None:
            return
        self._blocks.append(block)
        self._size_bytes += len(block)
        if self._size_bytes > self._max_bytes:
            self._blocks = None
