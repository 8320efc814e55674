"""The closed table of messages between HTTP workers and the engine process, and their framing.

msgpack of tagged structs behind a 4-byte length, over a private Unix socket. Free of I/O but for the check of
who is at the other end; never pickle. What is not in the table ends its connection with ProtocolError.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from longshore.errors import ProtocolError
from longshore_server.engines.base import EngineStats, FinishReason, JobImage, ModelInfo, SamplingSpec

T = TypeVar("T")

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
HEARTBEAT_INTERVAL_S = 0.25
HELLO_TIMEOUT_S = 5.0
_LENGTH = struct.Struct(">I")

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
ShortText = Annotated[str, Meta(max_length=256)]
TokenIds = tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of the table; a struct's tag is its name on the wire."""


# -- worker to engine --------------------------------------------------------------------------


class Hello(_Message, frozen=True, tag="hello"):
    """First on a connection."""

    version: int
    worker: ShortText


class Submit(_Message, frozen=True, tag="submit", kw_only=True):
    """A job under a stream number that the connection has not used before.

    `remaining_s` is what is left until its deadline; `replay` says that an engine died while it had this job.
    `images` are pixels; the engine checks them against the prompt's image tokens.
    """

    stream: Number
    request_id: ShortText
    prompt_token_ids: TokenIds
    params: SamplingSpec
    tenant: ShortText = ""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    remaining_s: float | None = None
    continue_from: TokenIds = ()
    replay: bool = False
    images: tuple[JobImage, ...] = ()


class Abort(_Message, frozen=True, tag="abort"):
    """Ends a stream; nothing more is said about it. Unknown streams are ignored, since endings cross."""

    stream: Number


class StatsRequest(_Message, frozen=True, tag="stats?"):
    serial: Number


# -- engine to worker --------------------------------------------------------------------------


class Ready(_Message, frozen=True, tag="ready"):
    """Answer to Hello.

    `incarnation` differs for every start of the engine. `blamed` is the request that was on trial when the
    engine before this one died, or nothing.
    """

    version: int
    incarnation: ShortText
    info: ModelInfo
    capabilities: frozenset[str]
    blamed: ShortText = ""


class TokenItem(msgspec.Struct, frozen=True, array_like=True):
    """One output of one stream; see EngineToken."""

    stream: int
    token_id: int | None
    offset: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0


class Tokens(_Message, frozen=True, tag="tokens"):
    """All outputs of one step for one worker."""

    items: tuple[TokenItem, ...]


class Failed(_Message, frozen=True, tag="failed"):
    """The end of one stream in an error; `code` is one of longshore.errors."""

    stream: Number
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class StatsReply(_Message, frozen=True, tag="stats"):
    serial: Number
    stats: EngineStats


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Sign of life, every HEARTBEAT_INTERVAL_S; `step_age_s` is how long the present step has taken."""

    step_age_s: float


class Refused(_Message, frozen=True, tag="refused"):
    """Why the engine closes this connection; the last message on it."""

    code: str
    message: str


WorkerMessage = Hello | Submit | Abort | StatsRequest
EngineMessage = Ready | Tokens | Failed | StatsReply | Heartbeat | Refused

_encoder = msgspec.msgpack.Encoder()
_worker_decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def to_frame(message: WorkerMessage | EngineMessage) -> bytes:
    """The message with its length in front; raises ProtocolError when it would be over the bound."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(payload)} bytes is over the bound of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def decode_worker_message(payload: bytes) -> WorkerMessage:
    """A message from a worker; raises ProtocolError on anything outside the table."""
    return _decode(_worker_decoder, payload)


def decode_engine_message(payload: bytes) -> EngineMessage:
    """A message from the engine; raises ProtocolError on anything outside the table."""
    return _decode(_engine_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise ProtocolError(f"a frame is not in the table of messages: {error}") from None


class FrameDecoder:
    """Cuts a byte stream into frames. I/O-free: feed it what arrived."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete with `data`; raises ProtocolError on a length over the bound.

        A length is refused as soon as it is read, so that no peer makes the buffer grow past one frame.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (payload_bytes,) = _LENGTH.unpack_from(self._buffer)
            if payload_bytes > self._max_frame_bytes:
                raise ProtocolError(
                    f"a frame of {payload_bytes} bytes is over the bound of {self._max_frame_bytes}"
                )
            end = _LENGTH.size + payload_bytes
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield frame


def check_peer(peer: socket.socket) -> None:
    """Raises ProtocolError unless this user, or root, is at the other end of a Unix socket.

    Where the platform can't tell (no SO_PEERCRED), the socket's private folder is the only guard.
    """
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    if uid not in (os.getuid(), 0):
        raise ProtocolError(f"user {uid} is at the other end of the engine's socket")
