"""The `/v1/stream` face: many generations over one socket, each with a credit of its own.

Translates the closed table of messages onto the same relay as HTTP; owns one socket and its generations.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import traceback
from collections.abc import AsyncIterator
from typing import Any

from longshore.errors import (
    AuthenticationError,
    BadMessageError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    LongshoreError,
    OverloadedError,
    ResumeUnavailableError,
)
from longshore.sse import SseDecoder, encode_message
from longshore.wire import (
    AnswerEvent,
    CancelMessage,
    CreditMessage,
    ErrorMessage,
    FinishMessage,
    GenerateMessage,
    PingMessage,
    PongMessage,
    ResumeMessage,
    ServerMessage,
    TokenEvent,
    TokenMessage,
    decode_client_message,
    limits,
    load_json,
    new_request_id,
)
from longshore.wire.render import ChunkReader
from longshore_edge.answers import StreamAnswer, WholeAnswer
from longshore_edge.asgi import Message, Receive, RequestHeaders, Scope, Send
from longshore_edge.auth import Client
from longshore_edge.call import Call
from longshore_edge.geo import Place
from longshore_edge.worker import Worker

PROTOCOL = "longshore.v1"
_KEY_PREFIX = "bearer."
_IDLE_S = 600.0
_CREDIT_WAIT_S = 600.0
_MAX_REQUEST_S = 3600.0
_DEADLINE_GRACE_S = 0.25
_CLOSE_POLICY, _CLOSE_GOING, _CLOSE_BUSY = 1008, 1001, 1013


async def serve_socket(worker: Worker, scope: Scope, receive: Receive, send: Send) -> None:
    """One socket from its handshake to its end; a refused handshake is answered with 403."""
    headers = RequestHeaders(scope["headers"])
    await receive()  # websocket.connect
    try:
        if scope["path"] != "/v1/stream":
            raise BadMessageError("there is no such socket")
        client = _authenticate(worker, headers, scope.get("subprotocols") or ())
        if worker.num_sockets >= worker.config.max_sockets:
            raise OverloadedError("too many sockets are open")
    except LongshoreError:
        await send({"type": "websocket.close", "code": _CLOSE_POLICY})
        return
    offered = scope.get("subprotocols") or ()
    await send({"type": "websocket.accept", "subprotocol": PROTOCOL if PROTOCOL in offered else None})
    worker.num_sockets += 1
    try:
        await Socket(worker, client, worker.place_of(scope, headers), receive, send).run()
    finally:
        worker.num_sockets -= 1


def _authenticate(worker: Worker, headers: RequestHeaders, subprotocols: Any) -> Client:
    """By the header, or by a subprotocol `bearer.KEY`, since browsers can send no header."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        return worker.keyring.client_of(authorization)
    for protocol in subprotocols:
        if protocol.startswith(_KEY_PREFIX):
            return worker.keyring.client_of_key(protocol.removeprefix(_KEY_PREFIX))
    raise AuthenticationError("no key")


class Credit:
    """How many token messages may still go out; None is no limit but the socket's own pace."""

    def __init__(self, tokens: int | None) -> None:
        self._left = tokens
        self._more = asyncio.Event()

    def grant(self, tokens: int) -> None:
        """Allow more, up to the wire's bound."""
        self._left = min(limits.MAX_CREDIT, (self._left or 0) + tokens)
        self._more.set()

    async def take(self) -> None:
        """Use one, waiting for it if there is none; raises CancelledError when none comes for long."""
        if self._left is None:
            return
        while self._left == 0:
            self._more.clear()
            try:
                async with asyncio.timeout(_CREDIT_WAIT_S):
                    await self._more.wait()
            except TimeoutError:
                raise CancelledError(f"no credit came for {_CREDIT_WAIT_S:.0f} s") from None
        self._left -= 1


@dataclasses.dataclass(slots=True)
class _Generation:
    credit: Credit
    task: asyncio.Task[None] | None = None
    is_cancelled: bool = False


class Socket:
    """The messages of one socket. Sends are one at a time, so that a slow socket holds its generations up."""

    def __init__(
        self, worker: Worker, client: Client, place: Place | None, receive: Receive, send: Send
    ) -> None:
        self._worker = worker
        self._client = client
        self._place = place
        self._receive = receive
        self._send = send
        self._send_lock = asyncio.Lock()
        self._generations: dict[str, _Generation] = {}
        self._is_gone = False

    async def run(self) -> None:
        """Read messages until the client closes or is silent for long; then stop what still runs."""
        try:
            while True:
                message = await self._next_message()
                if message is None:
                    return
                await self._take(message)
        finally:
            self._is_gone = True
            await self._stop_all()

    async def _next_message(self) -> Message | None:
        """The next frame; None when the socket is closed. A socket without generations may not idle long."""
        while True:
            try:
                async with asyncio.timeout(_IDLE_S):
                    message = await self._receive()
            except TimeoutError:
                if self._generations:
                    continue
                await self._send({"type": "websocket.close", "code": _CLOSE_GOING})
                return None
            return None if message["type"] == "websocket.disconnect" else message

    async def _take(self, message: Message) -> None:
        frame = message.get("text")
        generation_id: str | None = None
        try:
            data = frame if frame is not None else message.get("bytes") or b""
            body = load_json(data, max_bytes=self._worker.config.max_body_bytes)
            generation_id = _id_in(body)
            await self._act(decode_client_message(body))
        except LongshoreError as error:
            is_running = generation_id in self._generations  # an error with its id would be taken for its end
            await self._tell_error(None if is_running else generation_id, error)

    async def _act(self, message: Any) -> None:
        if isinstance(message, GenerateMessage):
            self._start(message)
        elif isinstance(message, CreditMessage):
            generation = self._generations.get(message.id)
            if generation is not None:
                generation.credit.grant(message.tokens)
        elif isinstance(message, CancelMessage):
            self._cancel(message.id)
        elif isinstance(message, PingMessage):
            await self._tell(PongMessage(message.nonce))
        elif isinstance(message, ResumeMessage):
            raise ResumeUnavailableError("this edge keeps no events to resume from")

    # -- generations ---------------------------------------------------------------------------

    def _start(self, message: GenerateMessage) -> None:
        if message.id in self._generations:
            raise BadMessageError(f"a generation {message.id!r} is running on this socket", param="id")
        if len(self._generations) >= limits.MAX_GENERATIONS_PER_SOCKET:
            raise OverloadedError(f"{limits.MAX_GENERATIONS_PER_SOCKET} generations run on this socket")
        generation = self._generations[message.id] = _Generation(Credit(message.credit))
        generation.task = asyncio.create_task(self._generate(message, generation))

    def _cancel(self, generation_id: str) -> None:
        generation = self._generations.get(generation_id)
        if generation is not None and generation.task is not None and not generation.is_cancelled:
            generation.is_cancelled = True
            generation.task.cancel()

    async def _stop_all(self) -> None:
        tasks = [generation.task for generation in self._generations.values() if generation.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, message: GenerateMessage, generation: _Generation) -> None:
        """One generation, to its finish or its error; no failure of it touches the socket or another one."""
        outcome = "served"
        error: LongshoreError | None = None
        arrived_s = self._worker.clock()
        try:
            await self._answer(message, generation, arrived_s)
        except asyncio.CancelledError:
            if not generation.is_cancelled:
                raise
            outcome, error = "left", CancelledError("cancelled by the client")
        except TimeoutError:
            outcome, error = "failed", DeadlineExceededError("the request's time ran out at the edge")
        except LongshoreError as failure:
            outcome, error = "refused" if failure.status < 500 else "failed", failure
        except Exception:
            traceback.print_exc(file=sys.stderr)
            outcome, error = "failed", InternalError("an internal error; the log has it")
        finally:
            self._generations.pop(message.id, None)
            self._worker.metrics.count("longshore:edge_requests_total", outcome)
            self._worker.metrics.observe("longshore:edge_request_seconds", self._worker.clock() - arrived_s)
        if error is not None and not self._is_gone:
            await self._tell_error(message.id, error)

    async def _answer(self, message: GenerateMessage, generation: _Generation, arrived_s: float) -> None:
        call = self._call(message, arrived_s)
        left_s = call.remaining_s(arrived_s)
        with self._worker.admit(call):
            async with asyncio.timeout(_MAX_REQUEST_S if left_s is None else left_s + _DEADLINE_GRACE_S):
                relay = self._worker.relay
                answer = relay.open_from_memory(call) or await relay.open(call)
                assert not isinstance(answer, WholeAnswer), "a streaming request gets a stream"
                try:
                    await self._pass_on(message.id, call, answer, generation.credit)
                finally:
                    await answer.close()

    def _call(self, message: GenerateMessage, arrived_s: float) -> Call:
        """As over HTTP, always as a stream, whatever the request says."""
        request = message.request
        if not request.stream:
            request = dataclasses.replace(request, stream=True)
        extension = request.longshore
        request_id = extension.request_id or new_request_id()
        return self._worker.call(
            request, self._client, request_id, arrived_s, self._place, extension.traceparent
        )

    async def _pass_on(self, generation_id: str, call: Call, answer: StreamAnswer, credit: Credit) -> None:
        num_open = call.num_choices
        async for event in _events(answer, call.num_choices):
            if isinstance(event, TokenEvent):
                await credit.take()
                await self._tell(
                    TokenMessage(generation_id, event.mark, event.text, event.index, event.logprob)
                )
                continue
            num_open -= 1
            await self._tell(
                FinishMessage(
                    generation_id,
                    event.finish_reason,
                    event.index,
                    event.text,
                    num_open == 0,
                    event.usage,
                    event.report,
                )
            )

    # -- sending -------------------------------------------------------------------------------

    async def _tell(self, message: ServerMessage) -> None:
        """Send one message; a client that takes nothing for long loses the generation that speaks."""
        text = encode_message(message)
        try:
            async with asyncio.timeout(self._worker.config.client_timeout_s):
                async with self._send_lock:
                    await self._send({"type": "websocket.send", "text": text})
        except TimeoutError:
            raise CancelledError("the client takes no messages") from None

    async def _tell_error(self, generation_id: str | None, error: LongshoreError) -> None:
        with contextlib.suppress(CancelledError):
            await self._tell(ErrorMessage(error.to_body()["error"], generation_id))


async def _events(answer: StreamAnswer, num_choices: int) -> AsyncIterator[AnswerEvent]:
    """The events of a stream's blocks; raises AnswerInterruptedError unless every choice ended."""
    reader, decoder = ChunkReader(num_choices), SseDecoder()
    while (block := await answer.next_block()) is not None:
        for event in decoder.feed(block):
            if not event.is_done:
                for answer_event in reader.read(load_json(event.data)):
                    yield answer_event
    reader.finish()


def _id_in(body: Any) -> str | None:
    """The generation that a message names, as far as it can be told from one that can't be read."""
    name = body.get("id") if isinstance(body, dict) else None
    return name if isinstance(name, str) and 1 <= len(name) <= 64 else None
