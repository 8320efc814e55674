"""The thin HTTP layer over ASGI: bodies with a bound, answers, errors, and noticing that a client left.

Knows no routes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from longshore.errors import (
    BodyTooLargeError,
    CancelledError,
    InvalidRequestError,
    LongshoreError,
    OverloadedError,
    UnavailableError,
)
from longshore.wire import dump_json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
_DEFAULT_RETRY_AFTER_S = 1.0


class RequestHeaders:
    """The headers that arrived, by lower-case name; of repeated ones the first counts."""

    __slots__ = ("_values",)

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        values: dict[bytes, bytes] = {}
        for name, value in headers:
            values.setdefault(name, value)
        self._values = values

    def get(self, name: bytes) -> str | None:
        """The value as text, None if the header is not there."""
        value = self._values.get(name)
        return None if value is None else value.decode("latin-1")

    def joined(self, name: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """All values of a header that may be repeated, in order, as one list."""
        values = [value.decode("latin-1") for key, value in headers if key == name]
        return ",".join(values) if values else None


async def read_body(receive: Receive, headers: RequestHeaders, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body; raises BodyTooLargeError as soon as it is known, CancelledError if the client left."""
    length = headers.get(b"content-length")
    if length is not None and length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        await _discard(receive, max_bytes, timeout_s)
        raise BodyTooLargeError(f"the body has {length[:20]} bytes; the limit is {max_bytes}")
    message = await _receive(receive, timeout_s)
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        return _checked(body, max_bytes)
    parts, size_bytes = [body], len(body)
    while message.get("more_body", False):
        message = await _receive(receive, timeout_s)
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > max_bytes:
            parts.clear()
            await _discard(receive, max_bytes, timeout_s)
            raise BodyTooLargeError(f"the body is over the limit of {max_bytes} bytes")
    return _checked(b"".join(parts), max_bytes)


async def _discard(receive: Receive, max_bytes: int, timeout_s: float) -> None:
    """Read on for a while: a client that is still sending would else see a reset instead of the answer."""
    size_bytes, has_more = 0, True
    while has_more and size_bytes <= max_bytes:
        message = await _receive(receive, timeout_s)
        size_bytes += len(message.get("body", b""))
        has_more = message.get("more_body", False)


async def _receive(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise InvalidRequestError(f"nothing of the body came for {timeout_s:g} s") from None
    if message["type"] == "http.disconnect":
        raise CancelledError("the client left while sending")
    return message


def _checked(body: bytes, max_bytes: int) -> bytes:
    if len(body) > max_bytes:
        raise BodyTooLargeError(f"the body has {len(body)} bytes; the limit is {max_bytes}")
    return body


# -- answering ---------------------------------------------------------------------------------


async def send_bytes(
    send: Send, body: bytes, *, status: int = 200, content_type: bytes = JSON, headers: Headers | None = None
) -> None:
    """A whole answer."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", str(len(body)).encode()),
                *(headers or ()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, *, status: int = 200, headers: Headers | None = None) -> None:
    """A whole answer of JSON."""
    await send_bytes(send, dump_json(value), status=status, headers=headers)


async def send_error(send: Send, error: LongshoreError, request_id: str | None = None) -> None:
    """The error in OpenAI's shape, with Retry-After where waiting helps."""
    if error.request_id is None:
        error.request_id = request_id
    headers: Headers = []
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    if isinstance(error, OverloadedError | UnavailableError):
        wait_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send_json(send, error.to_body(), status=error.status, headers=headers)


# -- clients that leave ------------------------------------------------------------------------


class ClientWatch:
    """Cancels the task that made it when the client leaves, or takes nothing for too long.

    ASGI tells of a client's leaving only to those who call `receive`. `has_left` tells such a
    cancellation from any other.
    """

    def __init__(self, receive: Receive, watches: set[ClientWatch]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watches = watches
        self._listener: asyncio.Task[None] | None = asyncio.ensure_future(self._listen(receive))
        self.sending_since_s: float | None = None
        self.has_left = False
        watches.add(self)

    def stop(self) -> None:
        """The answer is out, or given up. Safe to call again."""
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
            self._watches.discard(self)

    def check(self, now_s: float, timeout_s: float) -> None:
        """Give the client up if a send has waited for it longer than `timeout_s`."""
        if self.sending_since_s is not None and now_s - self.sending_since_s > timeout_s:
            self._leave()

    def guarded(self, send: Send, clock: Callable[[], float]) -> Send:
        """`send`, with each wait for the client noted."""

        async def guarded_send(message: Message) -> None:
            self.sending_since_s = clock()
            await send(message)
            self.sending_since_s = None

        return guarded_send

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self.has_left and self._listener is not None:
            self.has_left = True
            self._task.cancel()


async def watch_senders(watches: set[ClientWatch], timeout_s: float, clock: Callable[[], float]) -> None:
    """Look once a second for clients that take nothing, until cancelled."""
    while True:
        await asyncio.sleep(min(1.0, timeout_s / 4))
        now_s = clock()
        for watch in list(watches):
            watch.check(now_s, timeout_s)
