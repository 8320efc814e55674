"""Codecs of both streams, free of I/O: server-sent events (WHATWG HTML 9.2) and WebSocket messages.

The decoder takes bytes in any pieces and never holds more than one bounded event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longshore.errors import BodyTooLargeError, LongshoreError, MalformedBodyError, ProtocolError
from longshore.wire import (
    ClientMessage,
    ServerMessage,
    decode_client_message,
    decode_server_message,
    dump_json,
    encode,
    limits,
    load_json,
)

__all__ = [
    "DONE",
    "KEEPALIVE",
    "ServerEvent",
    "SseDecoder",
    "encode_data",
    "encode_error",
    "encode_message",
    "read_client_message",
    "read_server_message",
]

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One dispatched event; `data` is its lines joined by newlines."""

    data: str
    event: str = "message"
    id: str = ""

    @property
    def is_done(self) -> bool:
        """True for OpenAI's end mark."""
        return self.data == "[DONE]"


def encode_data(value: Any, *, event: str | None = None, event_id: str | None = None) -> bytes:
    """One event whose data is `value` as JSON on a single line."""
    head = b""
    if event is not None:
        head += b"event: " + _one_line(event) + b"\n"
    if event_id is not None:
        head += b"id: " + _one_line(event_id) + b"\n"
    return head + b"data: " + dump_json(value) + b"\n\n"


def encode_error(error: LongshoreError) -> bytes:
    """The event that ends a stream which can't be finished; no `[DONE]` follows it."""
    return encode_data(error.to_body(), event="error")


def _one_line(text: str) -> bytes:
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError("an SSE field must be one line")
    return text.encode()


class SseDecoder:
    """Turns bytes into events, the same ones whichever way the bytes were cut.

    `max_event_bytes` bounds a line and what is held of an unfinished event.
    """

    def __init__(self, *, max_event_bytes: int = limits.MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._head: bytes | None = b""  # the first bytes, until it is clear whether they are a BOM
        self._skip_lf = False
        self._partial = bytearray()  # the line that has no end yet
        self._data: list[str] = []
        self._held_bytes = 0
        self._event = ""
        self._id = ""
        self._fault: ProtocolError | None = None

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes; an event is complete at its blank line.

        Raises ProtocolError when an event grows over the bound or is not UTF-8. Events before
        the fault are returned first, and the fault is raised by the next call, so none is lost.
        """
        if self._fault is not None:
            raise self._fault
        events: list[ServerEvent] = []
        try:
            for line in self._lines(chunk):
                event = self._take(line)
                if event is not None:
                    events.append(event)
            self._check_size(len(self._partial))
        except ProtocolError as fault:
            self._fault = fault
            if not events:
                raise
        return events

    @property
    def has_partial_event(self) -> bool:
        """True if the stream stopped inside an event, or at a fault."""
        return bool(self._head or self._partial or self._data or self._event or self._fault)

    def _lines(self, chunk: bytes) -> list[bytes]:
        """Complete lines; a line ends at LF, CR or CRLF, and a CRLF may be split over chunks."""
        if self._head is not None:
            chunk = self._head + chunk
            if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._head = chunk
                return []
            self._head = None
            chunk = chunk.removeprefix(_BOM)
        if self._skip_lf and chunk:
            self._skip_lf = False
            chunk = chunk.removeprefix(b"\n")
        if b"\r" in chunk:
            self._skip_lf = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *rest = chunk.split(b"\n")
        self._partial += first
        if not rest:
            return []
        lines = [bytes(self._partial), *rest[:-1]]
        self._partial = bytearray(rest[-1])
        return lines

    def _take(self, line: bytes) -> ServerEvent | None:
        self._check_size(len(line))
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._held_bytes += len(line) + 1
            self._data.append(self._decode(value))
        elif name == b"event":
            self._event = self._decode(value)
        elif name == b"id" and b"\0" not in value:
            self._id = self._decode(value)
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._held_bytes = [], "", 0
        if not data:
            return None
        return ServerEvent("\n".join(data), event or "message", self._id)

    def _check_size(self, line_bytes: int) -> None:
        if self._held_bytes + line_bytes > self._max_event_bytes:
            raise ProtocolError(f"an event is larger than {self._max_event_bytes} bytes")

    @staticmethod
    def _decode(value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ProtocolError("an event is not UTF-8") from None


# -- WebSocket ---------------------------------------------------------------------------------


def encode_message(message: ClientMessage | ServerMessage) -> str:
    """The text frame of a message."""
    return dump_json(encode(message)).decode()


def read_client_message(frame: str | bytes) -> ClientMessage:
    """The client's message in a frame; raises an InvalidRequestError or BodyTooLargeError."""
    return decode_client_message(load_json(frame, max_bytes=limits.MAX_WS_MESSAGE_BYTES))


def read_server_message(frame: str | bytes) -> ServerMessage:
    """The server's message in a frame; raises ProtocolError."""
    try:
        return decode_server_message(load_json(frame, max_bytes=limits.MAX_EVENT_BYTES))
    except (MalformedBodyError, BodyTooLargeError) as error:
        raise ProtocolError(f"the server sent a frame that can't be read: {error.message}") from None
