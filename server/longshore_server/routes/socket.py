"""One client's socket: reads its messages, runs its generations, and writes their events.

A message that can't be read is answered with an error and the socket lives on. Nothing here outlives the
socket: when the client leaves, every generation is ended in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from starlette.websockets import WebSocket, WebSocketDisconnect

from longshore.errors import (
    AnswerInterruptedError,
    CancelledError,
    DuplicateRequestError,
    InternalError,
    LongshoreError,
    RateLimitedError,
    ResumeUnavailableError,
)
from longshore.sse import encode_message, read_client_message
from longshore.wire import (
    AnswerEvent,
    CancelMessage,
    ClientMessage,
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
    limits,
    load_json,
    new_request_id,
)
from longshore_server.auth import Caller
from longshore_server.generation import AnswerService, AnswerStream

logger = logging.getLogger(__name__)

_IDLE_TIMEOUT_S = 300.0
_IDLE_CHECK_S = 5.0
_CLOSE_TIMEOUT_S = 10.0
_GOODBYE_TIMEOUT_S = 0.5
_CLOSE_HANDSHAKE_S = 0.5
_GOING_AWAY, _TRY_AGAIN_LATER = 1001, 1013  # RFC 6455, section 7.4.1


class Credit:
    """How many token messages a generation may still send; None is no limit."""

    def __init__(self, tokens: int | None) -> None:
        self._tokens = tokens
        self._granted = asyncio.Event()

    def grant(self, tokens: int) -> None:
        """Allow more messages; a generation without a limit stays without."""
        if self._tokens is not None:
            self._tokens = min(self._tokens + tokens, limits.MAX_CREDIT)
            self._granted.set()

    async def spend(self, timeout_s: float) -> None:
        """Use one up, waiting for it; raises AnswerInterruptedError when none comes in time."""
        if self._tokens is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while self._tokens == 0:
                    self._granted.clear()
                    await self._granted.wait()
        except TimeoutError:
            raise AnswerInterruptedError(f"the client gave no credit for {timeout_s:g} s") from None
        self._tokens -= 1


@dataclass(slots=True)
class _Generation:
    credit: Credit
    task: asyncio.Task[None]


class SocketSession:
    """Serves one accepted socket."""

    def __init__(self, websocket: WebSocket, caller: Caller, service: AnswerService) -> None:
        self._websocket = websocket
        self._caller = caller
        self._service = service
        self._generations: dict[str, _Generation] = {}  # whose end has not been told yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        self._is_closed = False
        self._serving: asyncio.Task[None] | None = None
        self._last_message_s = service.clock()

    async def serve(self) -> None:
        """Read messages until the client leaves, then end what still runs."""
        watchdog = asyncio.create_task(self._close_when_idle())
        self._serving = asyncio.current_task()
        try:
            while (frame := await self._frame()) is not None:
                await self._read(frame)
        except asyncio.CancelledError:
            if not self._is_closed:
                raise  # else the client did not answer our close in time
        finally:
            self._is_closed = True
            await self._end([watchdog, *self._tasks])

    async def say_goodbye(self) -> None:
        """Close the socket once the generations have told how they ended: this worker is going."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_GOODBYE_TIMEOUT_S)
        await self._close(_GOING_AWAY)

    async def _frame(self) -> str | bytes | None:
        message = await self._websocket.receive()
        self._last_message_s = self._service.clock()
        if message["type"] == "websocket.disconnect":
            return None
        frame: str | bytes | None = message.get("text")
        return message.get("bytes", b"") if frame is None else frame

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)

    # -- messages in ---------------------------------------------------------------------------

    async def _read(self, frame: str | bytes) -> None:
        try:
            await self._handle(read_client_message(frame))
        except LongshoreError as error:
            await self._fail(_id_in(frame), error)

    async def _handle(self, message: ClientMessage) -> None:
        match message:
            case GenerateMessage():
                self._start(message)
            case CancelMessage(id=name):
                if name in self._generations:  # else it has just ended, and its end is on the way
                    self._generations[name].task.cancel()
            case CreditMessage(id=name, tokens=tokens):
                if name in self._generations:
                    self._generations[name].credit.grant(tokens)
            case ResumeMessage():
                raise ResumeUnavailableError(
                    "this tier keeps no events: ask again with longshore.continue_from", param="request_id"
                )
            case PingMessage(nonce=nonce):
                await self._send(PongMessage(nonce))
            case PongMessage():
                pass

    def _start(self, message: GenerateMessage) -> None:
        if message.id in self._generations:
            raise DuplicateRequestError(f"id: {message.id!r} is running on this socket", param="id")
        if len(self._generations) >= limits.MAX_GENERATIONS_PER_SOCKET:
            raise RateLimitedError(
                f"{limits.MAX_GENERATIONS_PER_SOCKET} generations are running on this socket",
                retry_after_s=self._service.admission.retry_after_s(),
            )
        credit = Credit(message.credit)
        task = asyncio.create_task(self._generate(message, credit), name=f"generation-{message.id}")
        self._generations[message.id] = _Generation(credit, task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- one generation ------------------------------------------------------------------------

    async def _generate(self, message: GenerateMessage, credit: Credit) -> None:
        try:
            await self._answer(message, credit)
        except LongshoreError as error:
            await self._fail_generation(message.id, error)
        except asyncio.CancelledError:
            if not self._is_closed:
                await self._fail_generation(message.id, CancelledError("cancelled by the client"))
        except WebSocketDisconnect:
            pass
        except Exception:
            logger.exception("generation %s failed", message.id)
            bug = InternalError("the generation failed inside the server")
            await self._fail_generation(message.id, bug)

    async def _fail_generation(self, name: str, error: LongshoreError) -> None:
        self._generations.pop(name, None)
        await self._fail(name, error)

    async def _answer(self, message: GenerateMessage, credit: Credit) -> None:
        request = message.request
        request_id = request.longshore.request_id or new_request_id()
        plan = await self._service.plan(request, self._caller, request_id, self._service.clock())
        stream = self._service.open(plan)
        try:
            await self._relay(message.id, stream, credit)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        finally:
            await stream.aclose()

    async def _relay(self, name: str, stream: AnswerStream, credit: Credit) -> None:
        num_open = len(stream.plan.jobs)
        while not stream.is_over:
            for event in await stream.take():
                if isinstance(event, TokenEvent):
                    await credit.spend(self._service.config.reader_timeout_s)
                else:
                    num_open -= 1
                    if num_open == 0:  # once the client has read the end it may use the id again
                        self._generations.pop(name, None)
                await self._send(_message(name, event, is_last=num_open == 0))

    # -- messages out --------------------------------------------------------------------------

    async def _fail(self, name: str | None, error: LongshoreError) -> None:
        self._service.metrics.error(error)
        await self._send(ErrorMessage(error.to_body()["error"], name))

    async def _send(self, message: ServerMessage) -> None:
        """Write one frame; a client that takes none for `reader_timeout_s` loses the socket."""
        timeout_s = self._service.config.reader_timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._sending:
                await self._websocket.send({"type": "websocket.send", "text": encode_message(message)})
        except TimeoutError:
            await self._close(_TRY_AGAIN_LATER)
        except (RuntimeError, WebSocketDisconnect):  # closed under our hands; `serve` will be told
            pass

    async def _close(self, code: int) -> None:
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
                async with asyncio.timeout(_CLOSE_HANDSHAKE_S):
                    await self._websocket.close(code)
            if self._serving is not None:
                asyncio.get_running_loop().call_later(_CLOSE_HANDSHAKE_S, self._serving.cancel)

    async def _close_when_idle(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_CHECK_S)
            if not self._generations and self._service.clock() - self._last_message_s > _IDLE_TIMEOUT_S:
                await self._close(_GOING_AWAY)
                return


def _message(name: str, event: AnswerEvent, *, is_last: bool) -> ServerMessage:
    if isinstance(event, TokenEvent):
        return TokenMessage(name, event.mark, event.text, event.index, event.logprob)
    return FinishMessage(
        name,
        event.finish_reason,
        event.index,
        event.text,
        done=is_last,
        usage=event.usage,
        report=event.report,
    )


def _id_in(frame: str | bytes) -> str | None:
    """The id of a message that can't be carried out, so that its sender knows which one it was."""
    try:
        body = load_json(frame)
    except LongshoreError:
        return None
    name = body.get("id") if isinstance(body, dict) else None
    return name if isinstance(name, str) and 1 <= len(name) <= 64 else None
