"""Lets pages of named origins call the edge from a browser (the Fetch standard's CORS protocol).

Owns the headers and the preflight. Keys still decide who may ask: an origin permits nothing by itself.
"""

from __future__ import annotations

from longshore_edge.asgi import Headers, Message, RequestHeaders, Send, send_bytes

_METHODS = b"GET, HEAD, POST"
_REQUEST_HEADERS = b"authorization, content-type, range, if-range, if-none-match, x-request-id, traceparent"
_RESPONSE_HEADERS = b"x-request-id, retry-after, etag, content-range, accept-ranges"
_PREFLIGHT_AGE_S = b"600"


def allowed_origin(headers: RequestHeaders, origins: tuple[str, ...]) -> str | None:
    """The origin that asks, if it is one of `origins`; `*` stands for any."""
    origin = headers.get(b"origin")
    return origin if origin is not None and (origin in origins or "*" in origins) else None


def with_origin(send: Send, origin: str) -> Send:
    """`send`, its answers readable by pages of `origin`."""
    fields = _fields(origin)

    async def send_readable(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *fields]}
        await send(message)

    return send_readable


async def send_preflight(send: Send) -> None:
    """What a browser asks before it sends a key; `send` is already `with_origin`."""
    headers: Headers = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", _REQUEST_HEADERS),
        (b"access-control-max-age", _PREFLIGHT_AGE_S),
    ]
    await send_bytes(send, b"", status=204, headers=headers)


def _fields(origin: str) -> Headers:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _RESPONSE_HEADERS),
        (b"vary", b"origin"),
    ]
