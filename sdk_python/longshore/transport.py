"""Reaches edge and core: HTTP with server-sent events, and WebSocket. The only file that knows
httpx2 and websockets.

Gives events of the wire and raises errors of `longshore.errors`, nothing else; decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from longshore.config import HttpSettings
from longshore.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    LongshoreError,
    ProtocolError,
    QueueFullError,
    UnavailableError,
    UpstreamError,
    from_body,
)
from longshore.exchange import USER_AGENT, Exchange, answer_error, headers_for, model_list
from longshore.multiplex import Multiplexer
from longshore.watchdog import Watchdog
from longshore.wire import AnswerEvent, AnyRequest, ModelList, limits, load_json_object

if TYPE_CHECKING:
    import httpx2
    from websockets.asyncio.client import ClientConnection

_MAX_ERROR_BYTES = 64 * 1024
_SHORTEST_TIMEOUT_S = 0.001
_SOCKET_CLOSE_S = 2.0
_SOCKET_SEND_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Timing:
    """By when something must have come, in seconds of the monotonic clock."""

    first_token_by_s: float
    deadline_s: float


# -- what both shells share ---------------------------------------------------------------------


def _translated(error: Exception, node: str) -> LongshoreError:
    """The error of our tree for one of httpx2's."""
    import httpx2

    words = f"{node}: {type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return ConnectionFailedError(words)
    if isinstance(error, httpx2.PoolTimeout):
        return QueueFullError(f"{node}: every connection of this client is in use")
    if isinstance(error, httpx2.TimeoutException):
        return DeadlineExceededError(f"{node}: no answer in the time allowed ({type(error).__name__})")
    return UpstreamError(words)


def _late(node: str, begun: bool) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"{node}: " + ("the time ran out" if begun else "no first token in its time")
    )


def _client_arguments(settings: HttpSettings) -> dict[str, Any]:
    import httpx2

    return {
        "verify": settings.verify,
        "http2": settings.http2,
        "trust_env": settings.trust_env,
        "follow_redirects": False,
        "limits": httpx2.Limits(
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
            keepalive_expiry=settings.keepalive_expiry_s,
        ),
    }


def _timeout(settings: HttpSettings, left_s: float) -> httpx2.Timeout:
    import httpx2

    left_s = max(left_s, _SHORTEST_TIMEOUT_S)
    return httpx2.Timeout(left_s, connect=min(settings.connect_timeout_s, left_s))


# -- blocking ----------------------------------------------------------------------------------


class HttpTransport:
    """Blocking HTTP to any number of nodes, over one pool of connections."""

    def __init__(
        self, settings: HttpSettings, api_key: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._api_key = api_key
        self._clock = clock
        self._watchdog = Watchdog(clock)
        self._lock = threading.Lock()
        self._http: httpx2.Client | None = None
        self._is_closed = False

    def stream(
        self, node: str, request: AnyRequest, num_choices: int, timing: Timing
    ) -> Generator[AnswerEvent, None, None]:
        """The answer's events; closing the generator closes the connection."""
        import httpx2

        exchange = Exchange(node, self._api_key, request, num_choices)
        try:
            response = self._send(exchange, timing)
            try:
                yield from self._read(exchange, response, timing)
            finally:
                response.close()
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            raise _translated(error, node) from error

    def models(self, node: str, timeout_s: float) -> ModelList:
        """The node's models."""
        import httpx2

        try:
            response = self._client().get(
                node + "/v1/models",
                headers=headers_for(self._api_key, "application/json"),
                timeout=_timeout(self._settings, timeout_s),
            )
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _translated(error, node) from error
        return model_list(node, response.status_code, response.headers, response.content)

    def close(self) -> None:
        """Close every connection; further requests raise UnavailableError."""
        with self._lock:
            self._is_closed = True
            if self._http is not None:
                self._http.close()
        self._watchdog.close()

    def prepare(self) -> None:
        """Load the HTTP stack now, so that its start-up is not measured as a tier's slowness."""
        self._client()
        import_module("h11")

    def _client(self) -> httpx2.Client:
        import httpx2

        with self._lock:
            if self._is_closed:
                raise UnavailableError("this client is closed")
            if self._http is None:
                self._http = httpx2.Client(**_client_arguments(self._settings))
            return self._http

    def _send(self, exchange: Exchange, timing: Timing) -> httpx2.Response:
        client = self._client()
        timeout = _timeout(self._settings, timing.first_token_by_s - self._clock())
        message = client.build_request(
            "POST", exchange.url, content=exchange.body, headers=exchange.headers, timeout=timeout
        )
        response = client.send(message, stream=True)
        # From here the watchdog keeps the time: a read may last as long as the answer may.
        message.extensions["timeout"]["read"] = max(timing.deadline_s - self._clock(), _SHORTEST_TIMEOUT_S)
        return response

    def _read(
        self, exchange: Exchange, response: httpx2.Response, timing: Timing
    ) -> Generator[AnswerEvent, None, None]:
        import httpx2

        watch = self._watchdog.watch(_socket_of(response), timing.first_token_by_s)
        begun = False
        try:
            if response.status_code != 200:
                raise answer_error(response.status_code, response.headers, _read_some(response))
            exchange.check_head(response.headers)
            for data in response.iter_raw():
                for event in exchange.feed(data):
                    if not begun:
                        begun = True
                        self._watchdog.move(watch, timing.deadline_s)
                    yield event
                if exchange.is_done:
                    return
            if watch.fired:
                raise _late(exchange.node, begun)
            exchange.end()
        except httpx2.TransportError:
            if watch.fired:
                raise _late(exchange.node, begun) from None
            raise
        finally:
            self._watchdog.release(watch)


def _socket_of(response: httpx2.Response) -> socket.socket:
    sock: socket.socket = response.extensions["network_stream"].get_extra_info("socket")
    return sock


def _read_some(response: httpx2.Response) -> bytes:
    """The start of an error body; the rest is of no use."""
    data = b""
    for piece in response.iter_raw():
        data += piece
        if len(data) >= _MAX_ERROR_BYTES:
            break
    return data[:_MAX_ERROR_BYTES]


# -- asyncio -----------------------------------------------------------------------------------


class AsyncHttpTransport:
    """The same for asyncio; deadlines are kept by `asyncio.timeout` around each wait."""

    def __init__(
        self, settings: HttpSettings, api_key: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._api_key = api_key
        self._clock = clock
        self._http: httpx2.AsyncClient | None = None
        self._is_closed = False

    async def stream(
        self, node: str, request: AnyRequest, num_choices: int, timing: Timing
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The answer's events; closing the generator closes the connection."""
        import httpx2

        exchange = Exchange(node, self._api_key, request, num_choices)
        try:
            response = await self._by(timing.first_token_by_s, self._send(exchange, timing), node)
            try:
                async with contextlib.aclosing(self._read(exchange, response, timing)) as events:
                    async for event in events:
                        yield event
            finally:
                await response.aclose()
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            raise _translated(error, node) from error

    async def models(self, node: str, timeout_s: float) -> ModelList:
        """The node's models."""
        import httpx2

        get = self._client().get(
            node + "/v1/models",
            headers=headers_for(self._api_key, "application/json"),
            timeout=_timeout(self._settings, timeout_s),
        )
        try:
            response = await self._by(self._clock() + timeout_s, get, node)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _translated(error, node) from error
        return model_list(node, response.status_code, response.headers, response.content)

    async def close(self) -> None:
        """Close every connection; further requests raise UnavailableError."""
        self._is_closed = True
        if self._http is not None:
            await self._http.aclose()

    def prepare(self) -> None:
        """Load the HTTP stack now, so that its start-up is not measured as a tier's slowness."""
        self._client()
        for module in ("h11", "anyio", "anyio._backends._asyncio"):
            import_module(module)

    def _client(self) -> httpx2.AsyncClient:
        import httpx2

        if self._is_closed:
            raise UnavailableError("this client is closed")
        if self._http is None:
            self._http = httpx2.AsyncClient(**_client_arguments(self._settings))
        return self._http

    async def _send(self, exchange: Exchange, timing: Timing) -> httpx2.Response:
        client = self._client()
        timeout = _timeout(self._settings, timing.deadline_s - self._clock())
        message = client.build_request(
            "POST", exchange.url, content=exchange.body, headers=exchange.headers, timeout=timeout
        )
        return await client.send(message, stream=True)

    async def _read(
        self, exchange: Exchange, response: httpx2.Response, timing: Timing
    ) -> AsyncGenerator[AnswerEvent, None]:
        node = exchange.node
        if response.status_code != 200:
            body = await self._by(timing.first_token_by_s, _aread_some(response), node)
            raise answer_error(response.status_code, response.headers, body)
        exchange.check_head(response.headers)
        begun = False
        async with contextlib.aclosing(response.aiter_raw()) as pieces:
            while True:
                by_s = timing.deadline_s if begun else timing.first_token_by_s
                data = await self._by(by_s, anext(pieces, None), node, begun)
                if data is None:
                    exchange.end()
                    return
                for event in exchange.feed(data):
                    begun = True
                    yield event
                if exchange.is_done:
                    return

    async def _by(self, by_s: float, work: Awaitable[_T], node: str, begun: bool = False) -> _T:
        try:
            async with asyncio.timeout(by_s - self._clock()):
                return await work
        except TimeoutError:
            raise _late(node, begun) from None


async def _aread_some(response: httpx2.Response) -> bytes:
    data = b""
    async with contextlib.aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) >= _MAX_ERROR_BYTES:
                break
    return data[:_MAX_ERROR_BYTES]


# -- WebSocket ---------------------------------------------------------------------------------


class SocketTransport:
    """Many generations at once over one WebSocket; made by `open_socket`.

    Each generation has its own credit, so that a slow reader holds up only itself.
    """

    def __init__(self, node: str, connection: ClientConnection, clock: Callable[[], float]) -> None:
        self.node = node
        self._connection = connection
        self._clock = clock
        self._mux = Multiplexer()
        self._arrivals: dict[str, asyncio.Queue[AnswerEvent | LongshoreError]] = {}
        self._pongs: dict[str, asyncio.Future[None]] = {}
        self._end: LongshoreError | None = None
        self._reader = asyncio.create_task(self._read())

    @property
    def num_unread(self) -> int:
        """Events that have arrived and wait for their readers."""
        return sum(arrivals.qsize() for arrivals in self._arrivals.values())

    async def stream(
        self, request: AnyRequest, num_choices: int, timing: Timing
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The answer's events; closing the generator cancels the generation at the server."""
        if self._end is not None:
            raise self._end
        generation_id, frame = self._mux.start(request, num_choices)
        arrivals: asyncio.Queue[AnswerEvent | LongshoreError] = asyncio.Queue()  # bounded by its credit
        self._arrivals[generation_id] = arrivals
        begun = False
        try:
            await self._send(frame)
            while self._mux.is_open(generation_id) or not arrivals.empty():
                by_s = timing.deadline_s if begun else timing.first_token_by_s
                item = await self._next(arrivals, by_s, begun)
                if isinstance(item, LongshoreError):
                    raise item
                begun = True
                yield item
                grant = self._mux.consumed(generation_id, item)
                if grant is not None:
                    await self._send(grant)
        finally:
            self._arrivals.pop(generation_id, None)
            await self._cancel(generation_id)

    async def ping(self, timeout_s: float) -> float:
        """Seconds until the server answered; raises DeadlineExceededError or the socket's end."""
        if self._end is not None:
            raise self._end
        nonce, frame = self._mux.ping()
        begin_s = self._clock()
        self._pongs[nonce] = asyncio.get_running_loop().create_future()
        try:
            await self._send(frame)
            async with asyncio.timeout(timeout_s):
                await self._pongs[nonce]
        except TimeoutError:
            raise DeadlineExceededError(f"{self.node}: no pong within {timeout_s:g} s") from None
        finally:
            self._pongs.pop(nonce)
        return self._clock() - begin_s

    async def close(self) -> None:
        """Close the socket; what was under way ends with UnavailableError."""
        self._fail_all(UnavailableError("this socket is closed"))
        await self._connection.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _next(
        self, arrivals: asyncio.Queue[AnswerEvent | LongshoreError], by_s: float, begun: bool
    ) -> AnswerEvent | LongshoreError:
        try:
            async with asyncio.timeout(by_s - self._clock()):
                return await arrivals.get()
        except TimeoutError:
            raise _late(self.node, begun) from None

    async def _cancel(self, generation_id: str) -> None:
        frame = self._mux.cancel(generation_id)
        if frame is not None and self._end is None:
            with contextlib.suppress(LongshoreError):
                await self._send(frame)

    async def _send(self, frame: str) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            async with asyncio.timeout(_SOCKET_SEND_S):
                await self._connection.send(frame)
        except (ConnectionClosed, TimeoutError, OSError) as error:
            raise self._end or UpstreamError(f"{self.node}: the socket is closed: {error}") from None

    async def _read(self) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            async for frame in self._connection:
                await self._take(frame)
            self._fail_all(UpstreamError(f"{self.node}: the server closed the socket"))
        except (ConnectionClosed, OSError) as error:
            self._fail_all(UpstreamError(f"{self.node}: the socket broke: {error}"))
        except LongshoreError as error:
            self._fail_all(error)
            await self._connection.close(1002)

    async def _take(self, frame: str | bytes) -> None:
        received = self._mux.receive(frame)
        for generation_id, item in received.items:
            arrivals = self._arrivals.get(generation_id)
            if arrivals is not None:
                arrivals.put_nowait(item)
        pong = self._pongs.get(received.pong) if received.pong is not None else None
        if pong is not None and not pong.done():
            pong.set_result(None)
        for reply in received.replies:
            await self._send(reply)

    def _fail_all(self, error: LongshoreError) -> None:
        self._end = self._end or error
        for arrivals in self._arrivals.values():
            arrivals.put_nowait(error)
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)


async def open_socket(
    node: str,
    api_key: str | None,
    settings: HttpSettings,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> SocketTransport:
    """Connect to a node's `/v1/stream`; raises ConnectionFailedError or what the server answered."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus, WebSocketException

    url = node.replace("http", "ws", 1) + "/v1/stream"
    arguments: dict[str, Any] = {"ssl": settings.verify} if not isinstance(settings.verify, bool) else {}
    headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
    try:
        connection = await connect(
            url,
            additional_headers=headers,
            user_agent_header=USER_AGENT,
            compression=None,
            proxy=True if settings.trust_env else None,
            open_timeout=timeout_s,
            close_timeout=_SOCKET_CLOSE_S,
            max_size=limits.MAX_EVENT_BYTES,
            **arguments,
        )
    except InvalidStatus as error:
        raise _handshake_error(error.response.status_code, bytes(error.response.body or b"")) from None
    except (OSError, TimeoutError) as error:
        raise ConnectionFailedError(f"{node}: {type(error).__name__}: {error}") from None
    except WebSocketException as error:
        raise ProtocolError(f"{node}: no WebSocket: {error}") from None
    return SocketTransport(node, connection, clock)


def _handshake_error(status: int, body: bytes) -> LongshoreError:
    try:
        return from_body(status, load_json_object(body))
    except LongshoreError:
        return from_body(status, None)
