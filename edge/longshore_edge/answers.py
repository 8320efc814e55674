"""Answers on their way to the client: whole ones, and streams of blocks that end, are cut off or are closed.

A stream ends (`next_block` gives None) only when every choice had its end; anything else raises.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from longshore.errors import (
    AnswerInterruptedError,
    LongshoreError,
    MalformedBodyError,
    ProtocolError,
    from_body,
)
from longshore.sse import DONE, SseDecoder, encode_data
from longshore.wire import dump_json, load_json
from longshore_edge import frames
from longshore_edge.call import Call, complete_report
from longshore_edge.cores import Lease
from longshore_edge.retry import is_cores_fault
from longshore_edge.upstream import Upstream, read_block

_EOF_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A complete body of JSON. `is_cacheable` is False for answers of another model than asked for."""

    body: bytes
    model_digest: str | None = None
    is_cacheable: bool = True


class StreamAnswer(Protocol):
    """Blocks of whole server-sent events; `close` must always be called, and may be at any time."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_cacheable(self) -> bool: ...

    async def next_block(self) -> bytes | None: ...

    async def close(self) -> None: ...


Answer = WholeAnswer | StreamAnswer


class CoreStream:
    """The stream of one core. `prime` waits for the first event, before anything is sent to the client."""

    is_cacheable = True

    def __init__(
        self,
        call: Call,
        lease: Lease,
        response: aiohttp.ClientResponse,
        upstream: Upstream,
        node: str,
        clock: Callable[[], float],
    ) -> None:
        self._call = call
        self._lease = lease
        self._response = response
        self._upstream = upstream
        self._node = node
        self._clock = clock
        self._reader = frames.FrameReader()
        self._open_choices = set(range(call.num_choices))
        self._first: bytes | None = None
        self._first_s: float | None = None
        self._on_first: Callable[[], None] = lambda: None
        self._error: LongshoreError | None = None
        self._is_done = False
        self.num_tokens = 0

    async def prime(self, on_first: Callable[[], None]) -> None:
        """Wait for the first event and call `on_first`; raises what the core says instead of one."""
        self._on_first = on_first
        self._first = await self._read_event()
        if self._first is None:
            raise AnswerInterruptedError(f"{self._core}: the stream ended before it began")
        self._upstream.await_less(self._response)

    async def next_block(self) -> bytes | None:
        """The next whole events, or None at the true end of the answer."""
        if self._first is not None:
            block: bytes | None = self._first
            self._first = None
        else:
            block = await self._read()
        if block is None:
            return None
        self.num_tokens += frames.num_tokens(block)
        return block

    async def close(self) -> None:
        """After the end, the connection is kept for the next request; before it, the core is told to stop."""
        if self._is_done and self._error is None:
            self._lease.succeed()
            await self._reach_eof()
            self._response.release()
        else:
            self._lease.abandon()
            self._response.close()

    # -- reading -------------------------------------------------------------------------------

    @property
    def _core(self) -> str:
        return self._lease.core.name

    async def _read_event(self) -> bytes | None:
        """The first block that is not only comments, so that an attempt can still be given up."""
        while True:
            block = await self._read()
            if block is None or not all(frame.startswith(b":") for frame in frames.split(block)):
                return block

    async def _read(self) -> bytes | None:
        """The next block; what is wrong with the stream is raised once what came before it was given."""
        if self._error is not None:
            raise self._with_count(self._error)
        while not self._is_done:
            chunk = await self._read_chunk()
            if not chunk:
                self._end_of_stream()
                return None
            block = self._reader.feed(chunk)
            if not block:
                continue
            if frames.is_plain(block):
                self._begin()
            else:
                block = self._examine(block)
            if block:
                return block
        return None

    async def _read_chunk(self) -> bytes:
        try:
            return await read_block(self._core, self._response)
        except LongshoreError as error:
            self._fail()
            if self._lease.ttft_s is None:
                raise
            self._error = self._interrupted(error.message)
            raise self._error from None

    def _end_of_stream(self) -> None:
        """The connection ended in good order; the answer did so only if every choice is finished."""
        self._is_done = True
        if self._open_choices or self._reader.has_partial_frame:
            self._fail()
            self._error = self._interrupted(f"{self._core}: the stream ended without an end of the answer")
            raise self._error

    def _begin(self) -> None:
        """Something of the answer has come; noted before the report, which may be in the same block."""
        if self._lease.ttft_s is None:
            self._lease.first_token()
            self._on_first()

    def _examine(self, block: bytes) -> bytes:
        """Read the frames one by one; an error waits until what came before it was passed on."""
        head, rest = frames.split_plain_head(block)
        if head:
            self._begin()
        out = [head] if head else []
        try:
            for frame in frames.split(rest):
                out.append(self._examine_frame(frame))
                if self._is_done:
                    break
        except LongshoreError as error:
            if is_cores_fault(error):
                self._fail()
            else:
                self._lease.succeed()
            self._error = error
            if not out:
                raise
        return b"".join(out)

    def _examine_frame(self, frame: bytes) -> bytes:
        if frames.is_plain(frame):
            self._begin()
            return frame
        events = SseDecoder().feed(frame)
        if not events:
            return frame
        event = events[0]
        if event.is_done:
            self._end_of_stream()
            return DONE
        chunk = self._parse(event.data)
        if event.event == "error" or "error" in chunk:
            raise self._with_count(from_body(502, chunk))
        self._begin()
        self._note_ends(chunk)
        return self._with_report(chunk) or frame

    def _parse(self, data: str) -> dict[str, Any]:
        try:
            chunk = load_json(data)
        except MalformedBodyError as error:
            failure = ProtocolError(f"{self._core}: a chunk is not JSON: {error.message}")
            raise self._with_count(failure) from None
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices", []), list):
            raise self._with_count(ProtocolError(f"{self._core}: a chunk can't be read"))
        return chunk

    def _note_ends(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices", []):
            if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                index = choice.get("index")
                self._open_choices.discard(index if isinstance(index, int) else -1)

    def _with_report(self, chunk: dict[str, Any]) -> bytes | None:
        extension = chunk.get("longshore")
        report = extension.get("report") if isinstance(extension, dict) else None
        if not isinstance(report, dict):
            return None
        ttft_s = None if self._lease.ttft_s is None else self._lease.sent_s + self._lease.ttft_s
        complete_report(report, self._call, self._node, ttft_s, self._clock())
        return encode_data(chunk)

    # -- ends ----------------------------------------------------------------------------------

    def _fail(self) -> None:
        self._lease.fail()

    def _interrupted(self, message: str) -> LongshoreError:
        return self._with_count(AnswerInterruptedError(message))

    def _with_count(self, error: LongshoreError) -> LongshoreError:
        error.tokens_delivered = self.num_tokens
        error.request_id = self._call.request_id
        return error

    async def _reach_eof(self) -> None:
        """The last piece of the body carries nothing, but without it the connection can't be kept."""
        with contextlib.suppress(LongshoreError, TimeoutError):
            async with asyncio.timeout(_EOF_WAIT_S):
                while not self._response.content.at_eof() and await read_block(self._core, self._response):
                    pass


def complete_whole(
    body: bytes, call: Call, lease: Lease, node: str, max_bytes: int, on_first: Callable[[], None]
) -> WholeAnswer:
    """A core's whole answer with this edge's part in its report; raises ProtocolError if it is none."""
    try:
        answer = load_json(body, max_bytes=max_bytes)
    except MalformedBodyError as error:
        raise ProtocolError(f"{lease.core.name}: the answer is not JSON: {error.message}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ProtocolError(f"{lease.core.name}: the answer has no choices")
    report = answer.get("longshore")
    if not isinstance(report, dict):
        lease.first_token()
        on_first()
        return WholeAnswer(body)
    now_s = lease.clock()
    lease.first_token(_ttft_s(report, now_s - lease.sent_s))
    on_first()
    complete_report(report, call, node, lease.sent_s + (lease.ttft_s or 0.0), now_s)
    digest = report.get("model_digest")
    return WholeAnswer(dump_json(answer), digest if isinstance(digest, str) else None)


def _ttft_s(report: dict[str, Any], elapsed_s: float) -> float:
    """Time to first token as the edge would have seen it: the core's own, and what was not spent there."""
    for item in report.get("hops") or ():
        if isinstance(item, dict) and item.get("tier") == "core":
            ttft_ms, total_ms = item.get("ttft_ms"), item.get("total_ms")
            if isinstance(ttft_ms, int | float) and isinstance(total_ms, int | float):
                return min(elapsed_s, max(0.0, elapsed_s - total_ms / 1e3) + ttft_ms / 1e3)
    return elapsed_s
