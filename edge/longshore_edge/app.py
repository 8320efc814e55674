"""The edge as a bare ASGI application: routes, keys, limits and the life of one request.

What an answer is made of is the relay's; this file owns who may ask, and how the answer leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from longshore.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    LongshoreError,
    MethodNotAllowedError,
    NotFoundError,
    UnknownModelError,
)
from longshore.sse import encode_error
from longshore.wire import (
    AnyRequest,
    Extension,
    ModelList,
    decode,
    decode_chat_request,
    decode_completion_request,
    encode,
    load_json_object,
    new_request_id,
)
from longshore_edge.answers import Answer, StreamAnswer, WholeAnswer
from longshore_edge.asgi import (
    EVENT_STREAM,
    ClientWatch,
    Receive,
    RequestHeaders,
    Scope,
    Send,
    read_body,
    send_bytes,
    send_error,
    send_json,
)
from longshore_edge.bundles import send_file
from longshore_edge.call import CHAT_PATH, COMPLETION_PATH, Call
from longshore_edge.cors import allowed_origin, send_preflight, with_origin
from longshore_edge.worker import Worker

MAX_REQUEST_S = 3600.0
DEADLINE_GRACE_S = 0.25
_MAX_MEMO_BYTES = 8192

Route = Callable[[Scope, RequestHeaders, Receive, Send], Awaitable[None]]


class EdgeApp:
    """The application of one worker; `start` makes a Worker, whose parts live as long as the process."""

    def __init__(self, start: Callable[[], Awaitable[Worker]]) -> None:
        self._start = start
        self._worker: Worker | None = None
        self._routes: dict[str, dict[str, Route]] = {
            CHAT_PATH: {"POST": self._generate},
            COMPLETION_PATH: {"POST": self._generate},
            "/v1/models": {"GET": self._models},
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(receive, send)

    @property
    def worker(self) -> Worker:
        """The running parts."""
        assert self._worker is not None, "requests come after the start"
        return self._worker

    # -- life ----------------------------------------------------------------------------------

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    self._worker = await self._start()
                except LongshoreError as error:
                    await send({"type": "lifespan.startup.failed", "message": error.message})
                    return
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.worker.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; whatever it does, the next one is served."""
        has_begun = False

        async def tracked_send(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        headers = RequestHeaders(scope["headers"])
        origin = allowed_origin(headers, self.worker.config.allowed_origins)
        if origin is not None:
            send = with_origin(send, origin)
            if scope["method"] == "OPTIONS":
                await send_preflight(send)
                return
        try:
            await self._route(scope)(scope, headers, receive, tracked_send)
        except LongshoreError as error:
            if not has_begun:
                await send_error(send, error)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if has_begun:
                raise  # the server cuts the connection, so that no one takes the answer for whole
            await send_error(send, InternalError("an internal error; the log has it"))

    def _route(self, scope: Scope) -> Route:
        path: str = scope["path"]
        methods = self._routes.get(path)
        if methods is None:
            if path.startswith("/bundles/"):
                methods = {"GET": self._bundle, "HEAD": self._bundle}
            elif path.startswith("/v1/models/"):
                methods = {"GET": self._model}
            else:
                raise NotFoundError(f"there is no {path[:100]}")
        route = methods.get(scope["method"])
        if route is None:
            raise MethodNotAllowedError(f"{path[:100]} takes {', '.join(methods)}")
        return route

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        from longshore_edge.websocket import serve_socket

        await serve_socket(self.worker, scope, receive, send)

    # -- generation ----------------------------------------------------------------------------

    async def _generate(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        worker = self.worker
        arrived_s = worker.clock()
        request_id: str | None = None
        outcome = "refused"
        try:
            client = worker.keyring.client_of(headers.get(b"authorization"))
            config = worker.config
            body = await read_body(receive, headers, config.max_body_bytes, config.client_timeout_s)
            request = parse_request(scope["path"], body)
            request_id = request.longshore.request_id or request_id_of(headers)
            place = worker.place_of(scope, headers)
            traceparent = traceparent_of(request, headers)
            call = worker.call(request, client, request_id, arrived_s, place, traceparent)
            with worker.admit(call):
                outcome = await self._answer(call, receive, send)
        except CancelledError:
            outcome = "left"
        except LongshoreError as error:
            outcome = "refused" if error.status < 500 else "failed"
            await send_error(send, error, request_id)
        finally:
            worker.metrics.count("longshore:edge_requests_total", outcome)
            worker.metrics.observe("longshore:edge_request_seconds", worker.clock() - arrived_s)

    async def _answer(self, call: Call, receive: Receive, send: Send) -> str:
        """Answer an admitted request; returns how it ended. Raises only before the first byte."""
        relay = self.worker.relay
        answer = relay.open_from_memory(call)
        if answer is not None:
            await _send_at_hand(send, answer, call)
            return "served"
        watch = ClientWatch(receive, self.worker.watches)
        try:
            return await self._answer_watched(call, watch, send)
        except asyncio.CancelledError:
            if not watch.has_left:
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            return "left"
        finally:
            watch.stop()

    async def _answer_watched(self, call: Call, watch: ClientWatch, send: Send) -> str:
        answer: Answer | None = None
        sender = _StreamSender(send, watch, self.worker.clock)
        try:
            async with asyncio.timeout(_time_left_s(call, self.worker.clock())):
                answer = await self.worker.relay.open(call)
                if isinstance(answer, WholeAnswer):
                    watch.stop()
                    await send_bytes(send, answer.body, headers=_id_header(call))
                    return "served"
                await sender.send_all(answer, call)
                return "served"
        except TimeoutError:
            return await self._end(sender, answer, call, _out_of_time(call, answer))
        except LongshoreError as error:
            return await self._end(sender, answer, call, error)
        finally:
            if answer is not None and not isinstance(answer, WholeAnswer):
                self.worker.metrics.count("longshore:edge_tokens_total", by=answer.num_tokens)
                await answer.close()

    async def _end(
        self, sender: _StreamSender, answer: Answer | None, call: Call, error: LongshoreError
    ) -> str:
        """After the first byte an error is the stream's last event; before it, the caller's to send."""
        if not sender.has_begun:
            raise error
        error.request_id = call.request_id
        await sender.send_error(error)
        return "interrupted"

    # -- the rest ------------------------------------------------------------------------------

    async def _models(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        self.worker.keyring.client_of(headers.get(b"authorization"))
        await send_json(send, encode(ModelList(tuple(self.worker.model_cards()))))

    async def _model(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        self.worker.keyring.client_of(headers.get(b"authorization"))
        name = scope["path"].removeprefix("/v1/models/")
        for card in self.worker.model_cards():
            if card.id == name:
                await send_json(send, encode(card))
                return
        raise UnknownModelError(f"no model {name[:100]!r} here", param="model")

    async def _healthz(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        await send_json(send, {"status": "ok", "node": self.worker.config.node})

    async def _readyz(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        ailments = self.worker.check_ready()
        cores = {name: ailment or "ready" for name, ailment in ailments.items()}
        await send_json(send, {"status": "ready", "node": self.worker.config.node, "cores": cores})

    async def _metrics(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        if not self.worker.config.open_metrics:
            self.worker.keyring.client_of(headers.get(b"authorization"))
        body = self.worker.render_metrics()
        await send_bytes(send, body, content_type=b"text/plain; version=0.0.4; charset=utf-8")

    async def _bundle(self, scope: Scope, headers: RequestHeaders, receive: Receive, send: Send) -> None:
        if not self.worker.config.open_bundles:
            self.worker.keyring.client_of(headers.get(b"authorization"))
        file = self.worker.shelf.find(scope["path"])
        watch = ClientWatch(receive, self.worker.watches)
        try:
            guarded_send = watch.guarded(send, self.worker.clock)
            await send_file(guarded_send, file, headers, is_head=scope["method"] == "HEAD")
        except asyncio.CancelledError:
            if not watch.has_left:
                raise
        finally:
            watch.stop()


class _StreamSender:
    """Sends a stream's blocks as they come; `has_begun` once the client has been sent anything."""

    def __init__(self, send: Send, watch: ClientWatch, clock: Callable[[], float]) -> None:
        self._send = send
        self._watch = watch
        self._clock = clock
        self.has_begun = False

    async def send_all(self, answer: StreamAnswer, call: Call) -> None:
        """Everything up to the true end; raises what the stream raises."""
        send, watch, clock = self._send, self._watch, self._clock
        block = await answer.next_block()
        self.has_begun = True
        await send(_stream_start(call))
        while block is not None:
            watch.sending_since_s = clock()
            await send({"type": "http.response.body", "body": block, "more_body": True})
            watch.sending_since_s = None
            block = await answer.next_block()
        watch.stop()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_error(self, error: LongshoreError) -> None:
        """The event that ends a stream which can't be finished."""
        self._watch.sending_since_s = self._clock()
        await self._send({"type": "http.response.body", "body": encode_error(error), "more_body": False})


async def _send_at_hand(send: Send, answer: Answer, call: Call) -> None:
    """A cached answer: nothing to wait for, so nobody watches the client."""
    if isinstance(answer, WholeAnswer):
        await send_bytes(send, answer.body, headers=_id_header(call))
        return
    block = await answer.next_block()
    await send(_stream_start(call))
    await send({"type": "http.response.body", "body": block or b"", "more_body": False})


def _stream_start(call: Call) -> dict[str, Any]:
    headers = [
        (b"content-type", EVENT_STREAM),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx in front must not hold events back
        (b"x-request-id", call.request_id.encode()),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _id_header(call: Call) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", call.request_id.encode())]


def _time_left_s(call: Call, now_s: float) -> float:
    """With a little grace: a core that keeps the same deadline ends the answer better than a cut does."""
    left_s = call.remaining_s(now_s)
    return MAX_REQUEST_S if left_s is None else left_s + DEADLINE_GRACE_S


def _out_of_time(call: Call, answer: Answer | None) -> DeadlineExceededError:
    num_tokens = 0 if answer is None or isinstance(answer, WholeAnswer) else answer.num_tokens
    return DeadlineExceededError(
        "the request's time ran out at the edge", request_id=call.request_id, tokens_delivered=num_tokens
    )


# -- reading requests --------------------------------------------------------------------------


def parse_request(path: str, body: bytes) -> AnyRequest:
    """The typed request; equal small bodies are read once, since requests never change."""
    if len(body) > _MAX_MEMO_BYTES:
        return _parse(path, body)
    return _parse_once(path, body)


def _parse(path: str, body: bytes) -> AnyRequest:
    value = load_json_object(body)
    return decode_chat_request(value) if path == CHAT_PATH else decode_completion_request(value)


_parse_once = lru_cache(512)(_parse)


def request_id_of(headers: RequestHeaders) -> str:
    """The id in `x-request-id` where it has the wire's form, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None:
        with contextlib.suppress(InvalidRequestError):
            return decode(Extension, {"request_id": given}).request_id or new_request_id()
    return new_request_id()


def traceparent_of(request: AnyRequest, headers: RequestHeaders) -> str | None:
    """The trace context of the body, else of the header where it has W3C's form."""
    given = headers.get(b"traceparent")
    if request.longshore.traceparent is not None or given is None:
        return request.longshore.traceparent
    with contextlib.suppress(InvalidRequestError):
        return decode(Extension, {"traceparent": given}).traceparent
    return None
