"""Streamed answers as the caller holds them: chunks in OpenAI's shape, the text so far, the report.

Turns events into chunks; where they come from is the clients' business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Generic, Self, TypeVar

from longshore.call import Progress
from longshore.wire import (
    AnswerEvent,
    ChatCompletionChunk,
    Completion,
    FinishEvent,
    Report,
    Usage,
    decode,
)
from longshore.wire.render import ChatRenderer, CompletionRenderer

ChunkT = TypeVar("ChunkT")

__all__ = ["AsyncChatStream", "AsyncCompletionStream", "ChatStream", "CompletionStream"]


class Assembly(Generic[ChunkT]):
    """Chunks out of events, free of I/O; keeps what the caller may ask for at any time."""

    def __init__(
        self,
        renderer: ChatRenderer | CompletionRenderer,
        chunk_type: type[ChunkT],
        progress: Callable[[], Progress],
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self.report: Report | None = None
        self.usage: Usage | None = None
        self._renderer = renderer
        self._chunk_type = chunk_type
        self._progress = progress
        self._pending: deque[ChunkT] = deque()

    def take(self, event: AnswerEvent) -> None:
        """The next event; its chunks wait to be popped."""
        if isinstance(event, FinishEvent):
            self.report = event.report or self.report
            self.usage = event.usage or self.usage
        for chunk in self._renderer.chunks(event):
            self._pending.append(decode(self._chunk_type, chunk, lenient=True))

    def pop(self) -> ChunkT | None:
        """The next chunk, or None when another event is needed."""
        return self._pending.popleft() if self._pending else None

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._progress().collector.text()


class _StreamBase(Generic[ChunkT]):
    """What sync and async streams tell alike."""

    def __init__(self, assembly: Assembly[ChunkT]) -> None:
        self._assembly = assembly

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._assembly.text

    @property
    def report(self) -> Report | None:
        """Who served the answer and why; None until it has ended."""
        return self._assembly.report

    @property
    def usage(self) -> Usage | None:
        """Token counts; None until the answer has ended."""
        return self._assembly.usage

    @property
    def request_id(self) -> str:
        """The id that every tier knows the request by."""
        return self._assembly.request_id


class Stream(_StreamBase[ChunkT]):
    """Iterate it for chunks, or use it in a `with` statement to close it early.

    Raises AnswerInterruptedError (with `tokens_delivered` and `partial_text`) when the answer was
    cut off: it never ends as if it were whole.
    """

    def __init__(
        self, events: Generator[AnswerEvent, None, None], first: AnswerEvent, assembly: Assembly[ChunkT]
    ) -> None:
        super().__init__(assembly)
        self._events = events
        assembly.take(first)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChunkT:
        while (chunk := self._assembly.pop()) is None:
            self._assembly.take(next(self._events))
        return chunk

    def close(self) -> None:
        """Stop here: the tier is told, nothing more is generated."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_StreamBase[ChunkT]):
    """The same for `async for` and `async with`."""

    def __init__(
        self, events: AsyncGenerator[AnswerEvent, None], first: AnswerEvent, assembly: Assembly[ChunkT]
    ) -> None:
        super().__init__(assembly)
        self._events = events
        assembly.take(first)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChunkT:
        while (chunk := self._assembly.pop()) is None:
            self._assembly.take(await anext(self._events))
        return chunk

    async def close(self) -> None:
        """Stop here: the tier is told, nothing more is generated."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class ChatStream(Stream[ChatCompletionChunk]):
    """A streamed chat answer."""


class AsyncChatStream(AsyncStream[ChatCompletionChunk]):
    """A streamed chat answer for asyncio."""


class CompletionStream(Stream[Completion]):
    """A streamed completion."""


class AsyncCompletionStream(AsyncStream[Completion]):
    """A streamed completion for asyncio."""
