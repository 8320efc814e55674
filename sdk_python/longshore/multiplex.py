"""Many generations over one WebSocket, the client's side, free of I/O: frames out, frames in, credit.

Owns which generations are open and what each may still be sent; knows no socket and no clock.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from longshore.errors import LongshoreError, ProtocolError, QueueFullError, UpstreamError, from_body
from longshore.sse import encode_message, read_server_message
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    CancelMessage,
    CreditMessage,
    ErrorMessage,
    FinishEvent,
    FinishMessage,
    GenerateMessage,
    PingMessage,
    PongMessage,
    TokenEvent,
    TokenMessage,
    limits,
)

DEFAULT_WINDOW = 64


@dataclass(slots=True)
class _Generation:
    credit: int
    num_open: int
    num_unacknowledged: int = 0


@dataclass(frozen=True, slots=True)
class Received:
    """What a frame meant: events and errors by generation, frames to send back, a pong's nonce."""

    items: list[tuple[str, AnswerEvent | LongshoreError]] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    pong: str | None = None


class Multiplexer:
    """The open generations of one socket. `window` is how many tokens may be on their way to each."""

    def __init__(self, window: int = DEFAULT_WINDOW) -> None:
        self._window = window
        self._open: dict[str, _Generation] = {}
        self._next_number = 0

    def is_open(self, generation_id: str) -> bool:
        """True until the last choice finished, an error came, or it was cancelled."""
        return generation_id in self._open

    def start(self, request: AnyRequest, num_choices: int) -> tuple[str, str]:
        """(id, frame) of a new generation; raises QueueFullError at the socket's bound."""
        if len(self._open) >= limits.MAX_GENERATIONS_PER_SOCKET:
            raise QueueFullError(f"{len(self._open)} generations are under way on this socket")
        self._next_number += 1
        generation_id = f"g{self._next_number}"
        self._open[generation_id] = _Generation(self._window, num_choices)
        return generation_id, encode_message(GenerateMessage(generation_id, request, self._window))

    def cancel(self, generation_id: str) -> str | None:
        """The frame that stops a generation; None if it is over."""
        if self._open.pop(generation_id, None) is None:
            return None
        return encode_message(CancelMessage(generation_id))

    def consumed(self, generation_id: str, event: AnswerEvent) -> str | None:
        """The caller has read an event: a frame granting more, once half of the window is read."""
        generation = self._open.get(generation_id)
        if generation is None or not isinstance(event, TokenEvent):
            return None
        generation.num_unacknowledged += 1
        if generation.num_unacknowledged * 2 < self._window:
            return None
        granted, generation.num_unacknowledged = generation.num_unacknowledged, 0
        generation.credit += granted
        return encode_message(CreditMessage(generation_id, granted))

    def ping(self) -> tuple[str, str]:
        """(nonce, frame)."""
        nonce = secrets.token_hex(8)
        return nonce, encode_message(PingMessage(nonce))

    def receive(self, frame: str | bytes) -> Received:
        """What a frame means; raises ProtocolError if it can't be read.

        Messages of a generation that is over are dropped: they crossed our cancel on the way.
        """
        message = read_server_message(frame)
        if isinstance(message, PingMessage):
            return Received(replies=[encode_message(PongMessage(message.nonce))])
        if isinstance(message, PongMessage):
            return Received(pong=message.nonce)
        if isinstance(message, ErrorMessage):
            return self._failed(message)
        generation = self._open.get(message.id)
        if generation is None:
            return Received()
        if isinstance(message, TokenMessage):
            return self._token(message, generation)
        return self._finish(message, generation)

    def _token(self, message: TokenMessage, generation: _Generation) -> Received:
        generation.credit -= 1
        if generation.credit < 0:
            del self._open[message.id]
            error = ProtocolError("the server sent more tokens than it was granted")
            return Received([(message.id, error)], [encode_message(CancelMessage(message.id))])
        event = TokenEvent(message.mark, message.text, message.index, message.logprob)
        return Received([(message.id, event)])

    def _finish(self, message: FinishMessage, generation: _Generation) -> Received:
        generation.num_open -= 1
        if message.done or generation.num_open <= 0:
            del self._open[message.id]
        event = FinishEvent(message.finish_reason, message.index, message.text, message.usage, message.report)
        return Received([(message.id, event)])

    def _failed(self, message: ErrorMessage) -> Received:
        """An error without an id is about a frame of ours; which one can't be known, so all end."""
        error = from_body(UpstreamError.status, {"error": message.error})
        if message.id is None:
            ended = list(self._open)
            self._open.clear()
        else:
            ended = [message.id] if self._open.pop(message.id, None) else []
        return Received([(generation_id, error) for generation_id in ended])
