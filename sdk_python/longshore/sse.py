"""Codecs of both streams, free of I/O: server-sent events (WHATWG HTML 9.2) and WebSocket messages.

The decoder takes bytes in any pieces and never holds more than one bounded event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longshore.errors import LongshoreError, MalformedBodyError, ProtocolError
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
    """Turns bytes into events. `max_event_bytes` bounds what is held of an unfinished one."""

    def __init__(self, *, max_event_bytes: int = limits.MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = b""
        self._data: list[str] = []
        self._held_bytes = 0
        self._event = ""
        self._id = ""
        self._skip_lf = False
        self._started = False

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes; an event is complete at its blank line.

        Raises ProtocolError when an event grows over the bound or is not UTF-8.
        """
        events: list[ServerEvent] = []
        for line in self._lines(chunk):
            event = self._take(line)
            if event is not None:
                events.append(event)
        if len(self._tail) + self._held_bytes > self._max_event_bytes:
            raise ProtocolError(f"an event is larger than {self._max_event_bytes} bytes")
        return events

    @property
    def has_partial_event(self) -> bool:
        """True if the stream stopped inside an event."""
        return bool(self._tail or self._data)

    def _lines(self, chunk: bytes) -> list[bytes]:
        """Complete lines; a line ends at LF, CR or CRLF, and a CRLF may be split over chunks."""
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
        buffer = self._tail + chunk
        if not self._started and len(buffer) >= 3:
            self._started = True
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
        if b"\r" in buffer:
            self._skip_lf = buffer.endswith(b"\r")
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = buffer.split(b"\n")
        return lines

    def _take(self, line: bytes) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        text = self._decode(value.removeprefix(b" "))
        if name == b"data":
            self._held_bytes += len(value) + 1
            self._data.append(text)
            if self._held_bytes > self._max_event_bytes:
                raise ProtocolError(f"an event is larger than {self._max_event_bytes} bytes")
        elif name == b"event":
            self._event = text
        elif name == b"id" and "\0" not in text:
            self._id = text
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._held_bytes = [], "", 0
        if not data:
            return None
        return ServerEvent("\n".join(data), event or "message", self._id)

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
    except MalformedBodyError as error:
        raise ProtocolError(f"the server sent a frame that is not JSON: {error.message}") from None
