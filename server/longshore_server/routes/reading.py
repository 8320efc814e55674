"""Reads what a client sends: a bounded body within a bounded time, strict JSON, the request's id."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection, Request

from longshore.errors import BodyTooLargeError, CancelledError, LongshoreError, MalformedBodyError
from longshore.wire import AnyRequest, decode, load_json_object, new_request_id
from longshore.wire.request import RequestId

REQUEST_ID_HEADER = "x-request-id"
_DRAIN_TIMEOUT_S = 5.0


async def read_json_object(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The body as a JSON object; raises BodyTooLargeError, MalformedBodyError or CancelledError."""
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read_bounded(request, max_bytes)
    except TimeoutError:
        raise MalformedBodyError(f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise CancelledError("the client left before its body was whole") from None
    return load_json_object(body, max_bytes=max_bytes)


async def _read_bounded(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    chunks: list[bytes] = []
    num_bytes = int(announced) if announced.isdigit() and len(announced) < 20 else 0
    if num_bytes > max_bytes:
        raise await _too_large(request, max_bytes)
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            chunks.clear()
            raise await _too_large(request, max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


async def _too_large(request: Request, max_bytes: int) -> BodyTooLargeError:
    """The error, after throwing away as much again: a client cut off while it sends sees no answer."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            while num_bytes <= max_bytes:
                message = await request.receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    return BodyTooLargeError(f"the body is over the limit of {max_bytes} bytes")


def request_id_of(request: AnyRequest, connection: HTTPConnection) -> str:
    """The id in the body, else the one in the header if it is well-formed, else a new one.

    It is kept with the connection, so that an error after this names it too.
    """
    request_id = request.longshore.request_id or known_request_id(connection) or new_request_id()
    connection.state.request_id = request_id
    return request_id


def known_request_id(connection: HTTPConnection) -> str | None:
    """The id that was given to this connection's request, as far as it is known by now."""
    known: str | None = getattr(connection.state, "request_id", None)
    return known or _header_request_id(connection.headers.get(REQUEST_ID_HEADER))


def _header_request_id(header: str | None) -> str | None:
    if header is None:
        return None
    try:
        return decode(RequestId, header)  # type: ignore[arg-type]  # an annotated str decodes as one
    except LongshoreError:
        return None
