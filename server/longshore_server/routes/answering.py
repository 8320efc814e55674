"""Sends one answer over HTTP, whole or as server-sent events, and ends it when the client leaves.

Each token goes out at once; tokens that are ready together share a write. A stream ends in [DONE] or in an
error event, and an error that comes before the first byte has its own status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from longshore.errors import AnswerInterruptedError, CancelledError, LongshoreError
from longshore.sse import DONE, KEEPALIVE, encode_data, encode_error
from longshore.wire import AnswerEvent, ChatRequest, dump_json, encode
from longshore.wire.render import AnswerCollector, ChatRenderer, CompletionRenderer
from longshore_server.generation import AnswerService, AnswerStream
from longshore_server.planning import Plan
from longshore_server.routes.reading import REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx's proxy would collect chunks otherwise
)


class _ReaderStalledError(Exception):
    """The client's side of the connection is full and stays so."""


class AnswerResponse(Response):
    """The response of a planned request."""

    def __init__(self, service: AnswerService, plan: Plan) -> None:
        super().__init__()
        self._service = service
        self._plan = plan
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._service.open(self._plan)
        watcher = asyncio.create_task(_cancel_when_client_leaves(receive, stream))
        try:
            if self._plan.request.stream:
                await self._send_events(stream, send)
            else:
                await self._send_whole(stream, send)
        except CancelledError:
            pass  # nobody is left to be told
        except _ReaderStalledError as error:  # it takes no more bytes, hence no error event either
            self._service.metrics.error(AnswerInterruptedError(str(error)))
            logger.warning("request %s: %s", self._plan.request_id, error)
        finally:
            watcher.cancel()
            await stream.aclose()

    # -- whole ---------------------------------------------------------------------------------

    async def _send_whole(self, stream: AnswerStream, send: Send) -> None:
        collector = AnswerCollector(len(self._plan.jobs))
        while not stream.is_over:
            for event in await stream.take():
                collector.add(event)
        body = dump_json(self._body(collector))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._start(send, headers)
        await self._write(send, body, more=False)

    def _body(self, collector: AnswerCollector) -> dict[str, Any]:
        frame: dict[str, Any] = {
            "request_id": self._plan.request_id,
            "model": self._plan.model,
            "created": self._created,
        }
        if isinstance(self._plan.request, ChatRequest):
            return encode(collector.chat_completion(**frame))
        return encode(collector.completion(**frame))

    # -- streamed ------------------------------------------------------------------------------

    async def _send_events(self, stream: AnswerStream, send: Send) -> None:
        keepalive_s = self._service.config.keepalive_s
        events = await stream.take(keepalive_s)  # an error raised here still gets its status
        await self._start(send, list(_EVENT_STREAM))
        renderer = self._renderer()
        try:
            while True:
                await self._write(send, _render(renderer, events) or KEEPALIVE)
                if stream.is_over:
                    break
                events = await stream.take(keepalive_s)
                if not events and stream.is_over:
                    break
            await self._write(send, DONE, more=False)
        except CancelledError:
            raise
        except LongshoreError as error:
            self._service.metrics.error(error)
            await self._write(send, encode_error(error), more=False)

    def _renderer(self) -> ChatRenderer | CompletionRenderer:
        request = self._plan.request
        kind = ChatRenderer if isinstance(request, ChatRequest) else CompletionRenderer
        return kind(
            request_id=self._plan.request_id,
            model=self._plan.model,
            created=self._created,
            num_choices=len(self._plan.jobs),
            include_usage=request.stream_options is not None and request.stream_options.include_usage,
        )

    # -- the wire ------------------------------------------------------------------------------

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((REQUEST_ID_HEADER.encode(), self._plan.request_id.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Send bytes; a client that takes none of them for `reader_timeout_s` has its answer ended."""
        timeout_s = self._service.config.reader_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise _ReaderStalledError(f"the client took nothing for {timeout_s:g} s") from None


def _render(renderer: ChatRenderer | CompletionRenderer, events: list[AnswerEvent]) -> bytes:
    return b"".join(encode_data(chunk) for event in events for chunk in renderer.chunks(event))


async def _cancel_when_client_leaves(receive: Receive, stream: AnswerStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()
