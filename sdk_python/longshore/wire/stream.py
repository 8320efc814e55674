"""The closed table of WebSocket messages at `/v1/stream`: many generations over one socket.

A generation is named by `id`, chosen by the client and unique on its socket. Each has its own
credit: the server sends no more `token` messages of a generation than it was granted, so that a
slow reader of one does not hold up the others. No credit message means no limit but the
server's own bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len, MaxLen

from longshore.errors import BadMessageError, InvalidRequestError, ProtocolError
from longshore.wire import limits
from longshore.wire.event import FinishReason, Index, Offset, Report, TokenLogprob, TokenMark, Usage
from longshore.wire.request import AnyRequest, RequestId, Text, decode_any_request, new_request_id
from longshore.wire.schema import decode

GenerationId = Annotated[str, Len(1, 64)]
Credit = Annotated[int, Interval(ge=1, le=limits.MAX_CREDIT)]
Nonce = Annotated[str, MaxLen(64)]


@dataclass(frozen=True, slots=True)
class GenerateMessage:
    """Client: start a generation. `credit` is how many token messages may come at first."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id", "request"})
    id: GenerationId
    request: AnyRequest
    credit: Credit | None = None
    type: Literal["generate"] = "generate"


@dataclass(frozen=True, slots=True)
class CancelMessage:
    """Client: stop a generation; the server ends it with an `error` of code `cancelled`."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id"})
    id: GenerationId
    type: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class ResumeMessage:
    """Client: send what came after `offset` tokens of the request `request_id`."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id", "request_id", "offset"})
    id: GenerationId
    request_id: RequestId
    offset: Offset
    index: Index = 0
    credit: Credit | None = None
    type: Literal["resume"] = "resume"


@dataclass(frozen=True, slots=True)
class CreditMessage:
    """Client: `tokens` more token messages of this generation may come."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id", "tokens"})
    id: GenerationId
    tokens: Credit
    type: Literal["credit"] = "credit"


@dataclass(frozen=True, slots=True)
class PingMessage:
    """Either side: answer with a `pong` of the same nonce."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type"})
    nonce: Nonce = ""
    type: Literal["ping"] = "ping"


@dataclass(frozen=True, slots=True)
class PongMessage:
    """The answer to a ping."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type"})
    nonce: Nonce = ""
    type: Literal["pong"] = "pong"


@dataclass(frozen=True, slots=True)
class TokenMessage:
    """Server: one token of one choice."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id", "mark", "text"})
    id: GenerationId
    mark: TokenMark
    text: Text = ""
    index: Index = 0
    logprob: TokenLogprob | None = None
    type: Literal["token"] = "token"


@dataclass(frozen=True, slots=True)
class FinishMessage:
    """Server: the true end of one choice; the last one has `done`, `usage` and `report`."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "id", "finish_reason", "done"})
    id: GenerationId
    finish_reason: FinishReason
    index: Index = 0
    text: Text = ""
    done: bool = True
    usage: Usage | None = None
    report: Report | None = None
    type: Literal["finish"] = "finish"


@dataclass(frozen=True, slots=True)
class ErrorMessage:
    """Server: the generation ended in an error; without `id`, a message could not be read.

    `error` has the form of the HTTP error body's inner object.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type", "error"})
    error: dict[str, Any]
    id: GenerationId | None = None
    type: Literal["error"] = "error"


ClientMessage = GenerateMessage | CancelMessage | ResumeMessage | CreditMessage | PingMessage | PongMessage
ServerMessage = TokenMessage | FinishMessage | ErrorMessage | PingMessage | PongMessage

_CLIENT: dict[str, type[Any]] = {
    "cancel": CancelMessage,
    "resume": ResumeMessage,
    "credit": CreditMessage,
    "ping": PingMessage,
    "pong": PongMessage,
}
_SERVER: dict[str, type[Any]] = {
    "token": TokenMessage,
    "finish": FinishMessage,
    "error": ErrorMessage,
    "ping": PingMessage,
    "pong": PongMessage,
}


@dataclass(frozen=True, slots=True)
class _GenerateFrame:
    """A generate message before its request is decoded as chat or completion."""

    type: str
    id: GenerationId
    request: Any
    credit: Credit | None = None


def decode_client_message(body: Any) -> ClientMessage:
    """The typed message of a parsed body.

    A bare chat request (an object with `model` and no `type`) is taken as `generate` under a
    fresh id. Raises BadMessageError for an unknown type, and InvalidRequestError or a subclass
    that names the field for anything else.
    """
    if not isinstance(body, dict):
        raise BadMessageError("a message must be a JSON object")
    kind = body.get("type")
    if kind is None and "model" in body:
        return GenerateMessage(new_request_id(), decode_any_request(body))
    if kind == "generate":
        frame = decode(_GenerateFrame, body)
        return GenerateMessage(frame.id, decode_any_request(frame.request), frame.credit)
    cls = _CLIENT.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise BadMessageError(f"unknown message type {str(kind)[:40]!r}", param="type")
    message: ClientMessage = decode(cls, body)
    return message


def decode_server_message(body: Any) -> ServerMessage:
    """The typed message of a parsed body; unknown fields are skipped. Raises ProtocolError."""
    kind = body.get("type") if isinstance(body, dict) else None
    cls = _SERVER.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"the server sent a message of unknown type {str(kind)[:40]!r}")
    try:
        message: ServerMessage = decode(cls, body, lenient=True)
    except InvalidRequestError as error:
        raise ProtocolError(f"the server sent a {kind} message that can't be read: {error.message}") from None
    return message
