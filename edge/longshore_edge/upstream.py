"""Connections to the cores: one aiohttp session with keep-alive pools, headers rebuilt, errors typed.

Sends one attempt and never retries; knows nothing of caching or of the client's connection.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import aiohttp
from yarl import URL

from longshore.errors import (
    ConnectionFailedError,
    LongshoreError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
    UpstreamError,
    from_body,
)
from longshore.wire import ASSERTION_HEADER, load_json
from longshore_edge.auth import AssertionMaker, Client
from longshore_edge.call import Call
from longshore_edge.config import EdgeConfig
from longshore_edge.cores import Core

_MAX_ERROR_BYTES = 64 * 1024
_MAX_PIECE_BYTES = 512 * 1024
_KEEPALIVE_S = 60.0
_ANSWER_TIMEOUT_S = 3600.0


class Upstream:
    """The session over all cores of one worker."""

    def __init__(
        self, config: EdgeConfig, assertions: AssertionMaker | None, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._assertions = assertions
        self._clock = clock
        connector = aiohttp.TCPConnector(
            limit=0, limit_per_host=config.max_in_flight, keepalive_timeout=_KEEPALIVE_S, ttl_dns_cache=60
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type", "Accept"),
        )
        # Reads of a stream are bounded by the first event's time and then by the idle time;
        # a whole answer sends nothing while it is made, so that its deadline is what bounds it.
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None, connect=config.connect_timeout_s, sock_read=config.first_event_timeout_s
        )
        self._whole_timeout = aiohttp.ClientTimeout(
            total=_ANSWER_TIMEOUT_S, connect=config.connect_timeout_s, sock_read=_ANSWER_TIMEOUT_S
        )
        self._probe_timeout = aiohttp.ClientTimeout(total=config.health_timeout_s)
        self._urls: dict[tuple[str, str], URL] = {}

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def send(self, core: Core, call: Call) -> aiohttp.ClientResponse:
        """Send the request; the response has status 200 and its body unread, and must be closed.

        Raises ConnectionFailedError when nothing was sent, UpstreamError when the connection was
        lost before an answer, and the core's own error when it sent one.
        """
        is_stream = call.request.stream
        headers = self._headers(core, call.client)
        headers["content-type"] = "application/json"
        headers["accept"] = "text/event-stream" if is_stream else "application/json"
        headers["x-request-id"] = call.request_id
        if call.traceparent is not None:
            headers["traceparent"] = call.traceparent
        with _typed_errors(core.name):
            response = await self._session.post(
                self._url(core, call.path),
                data=_payload(call.body(self._clock())),
                headers=headers,
                allow_redirects=False,
                timeout=self._stream_timeout if is_stream else self._whole_timeout,
            )
        if response.status != 200:
            raise await _error_of(core.name, response)
        return response

    async def get_json(self, core: Core, path: str, client: Client | None = None) -> tuple[int, Any]:
        """Status and parsed body of a small GET; without `client`, no credentials are sent."""
        headers = self._headers(core, client) if client is not None else {}
        with _typed_errors(core.name):
            async with self._session.get(
                self._url(core, path), headers=headers, allow_redirects=False, timeout=self._probe_timeout
            ) as response:
                body = await _read_bounded(response, self._config.max_answer_bytes)
        with contextlib.suppress(LongshoreError):
            return response.status, load_json(body, max_bytes=self._config.max_answer_bytes)
        return response.status, None

    async def read_whole(self, core: Core, response: aiohttp.ClientResponse) -> bytes:
        """The body, up to the settings' bound; raises UpstreamError when it is cut off."""
        with _typed_errors(core.name):
            return await _read_bounded(response, self._config.max_answer_bytes)

    def await_less(self, response: aiohttp.ClientResponse) -> None:
        """The first event came: from here on the idle time bounds each read."""
        connection = response.connection
        if connection is not None and connection.protocol is not None:
            connection.protocol.read_timeout = self._config.idle_timeout_s

    def _url(self, core: Core, path: str) -> URL:
        url = self._urls.get((core.name, path))
        if url is None:
            url = self._urls[core.name, path] = URL(core.settings.url.rstrip("/") + path)
        return url

    def _headers(self, core: Core, client: Client) -> dict[str, str]:
        if core.settings.api_key is not None:
            return {"authorization": f"Bearer {core.settings.api_key}"}
        assert self._assertions is not None, "the settings were checked at start"
        return {ASSERTION_HEADER: self._assertions.assertion_for(client)}


def _payload(body: bytes) -> bytes | io.BytesIO:
    """Large bodies as a file, which aiohttp writes in pieces."""
    return body if len(body) <= _MAX_PIECE_BYTES else io.BytesIO(body)


async def read_block(core_name: str, response: aiohttp.ClientResponse) -> bytes:
    """What has arrived of the body, waiting for the first byte of it; empty at its end."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _typed(core_name, error) from None


@contextlib.contextmanager
def _typed_errors(core_name: str) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _typed(core_name, error) from None


def _typed(core_name: str, error: Exception) -> LongshoreError:
    """Only a connection that was never made is sure to have sent nothing."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return ConnectionFailedError(f"{core_name}: no connection: {_words(error)}")
    if isinstance(error, TimeoutError):
        return UnavailableError(f"{core_name}: nothing came in time")
    if isinstance(error, aiohttp.ClientPayloadError):  # its own words are of chunks and lengths
        return UpstreamError(f"{core_name}: the connection was lost in the middle of the answer")
    return UpstreamError(f"{core_name}: the connection was lost: {_words(error)}")


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.errno) if error.errno else str(error.os_error)
    return str(error) or type(error).__name__


async def _read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if response.content_length is not None and response.content_length > max_bytes:
        response.close()
        raise ProtocolError(f"the core's answer is over {max_bytes} bytes")
    parts, size_bytes = [], 0
    while part := await response.content.readany():
        size_bytes += len(part)
        if size_bytes > max_bytes:
            response.close()
            raise ProtocolError(f"the core's answer is over {max_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


async def _error_of(core_name: str, response: aiohttp.ClientResponse) -> LongshoreError:
    """The error in a response that is not 200; its status decides where the body can't be read."""
    body: Any = None
    try:
        body = load_json(await _read_bounded(response, _MAX_ERROR_BYTES))
    except (LongshoreError, aiohttp.ClientError, OSError, TimeoutError):
        response.close()
    finally:
        response.release()
    if response.status in (401, 403) and not _is_about_the_request(body):
        return UpstreamError(f"{core_name} does not accept this edge: it answered {response.status}")
    error = from_body(response.status, body)
    if error.retry_after_s is None and isinstance(error, OverloadedError | UnavailableError):
        error.retry_after_s = _retry_after_s(response.headers)
    return error


def _is_about_the_request(body: Any) -> bool:
    """A 403 that names a parameter speaks of the client's request, not of the edge's credentials."""
    inner = body.get("error") if isinstance(body, dict) else None
    return isinstance(inner, dict) and inner.get("code") == "permission_denied"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
