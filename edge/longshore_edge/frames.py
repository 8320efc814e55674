"""Cuts a core's event stream into whole frames and tells plain token chunks from those that must be read.

I/O-free. A plain frame is passed on as the bytes that came; its JSON is never parsed.
"""

from __future__ import annotations

from collections.abc import Iterator

from longshore.errors import ProtocolError
from longshore.wire import limits

_END = b"\n\n"
# A quotation mark inside a JSON string is always escaped, so these keys can't stand in a text.
_UNFINISHED = b'"finish_reason":null'
_FINISHED = b'"finish_reason":"'
_MARK = b'"mark":'


class FrameReader:
    """Holds what came of an unfinished frame, up to `max_frame_bytes`."""

    def __init__(self, max_frame_bytes: int = limits.MAX_EVENT_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """All frames that are complete now, as one block; empty while there is none.

        Raises ProtocolError when a frame grows over the bound.
        """
        buffer = self._tail + chunk if self._tail else chunk
        if b"\r" in buffer:
            buffer = _with_line_feeds(buffer)
        end = buffer.rfind(_END) + len(_END)
        if end < len(_END):
            end = 0
        self._tail = buffer[end:]
        if len(self._tail) > self._max_frame_bytes:
            raise ProtocolError(f"an event is larger than {self._max_frame_bytes} bytes")
        return buffer[:end]

    @property
    def has_partial_frame(self) -> bool:
        """True if the stream stopped inside a frame."""
        return bool(self._tail.strip())


def is_plain(block: bytes) -> bool:
    """True if every frame of the block is one line of data, of a choice that goes on, without a report."""
    num_frames = block.count(_END)
    return (
        block.count(_UNFINISHED) == num_frames
        and block.count(b"\n") == 2 * num_frames
        and block.count(b"data: {") == num_frames
        and b'"report"' not in block
        and b'"error"' not in block
        and b'"usage"' not in block
    )


def split_plain_head(block: bytes) -> tuple[bytes, bytes]:
    """The plain frames before the first finish as one block, possibly empty, and all the rest."""
    finish = block.find(_FINISHED)
    start = block.rfind(_END, 0, finish) + len(_END) if finish >= 0 else 0
    head = block[:start] if start >= len(_END) else b""
    return (head, block[len(head) :]) if head and is_plain(head) else (b"", block)


def split(block: bytes) -> Iterator[bytes]:
    """The frames of a block, each with its blank line."""
    for frame in block.split(_END):
        if frame.strip(b"\n"):
            yield frame.lstrip(b"\n") + _END


def num_tokens(block: bytes) -> int:
    """Token chunks in the block."""
    return block.count(_MARK)


def _with_line_feeds(buffer: bytes) -> bytes:
    """CRLF and CR as LF; a CR at the very end stays, since its LF may be on the way."""
    held = buffer.endswith(b"\r")
    body = (buffer[:-1] if held else buffer).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return body + b"\r" if held else body
