"""Frames between the app and its model process: a 4-byte length, then JSON. Never pickle.

Owns the framing alone; what the frames mean stands in process.py and child.py.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from longshore.errors import DeviceError
from longshore.wire import dump_json, load_json_object

MAX_FRAME_BYTES = 32 * 1024 * 1024
_LENGTH = struct.Struct(">I")

Frame = dict[str, Any]


def write_frame(stream: BinaryIO, frame: Frame) -> None:
    """Write one frame and flush; OSError if the other side is gone."""
    body = dump_json(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise DeviceError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> Frame | None:
    """The next frame, or None where the stream ends, a frame cut short included."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise DeviceError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    body = stream.read(length)
    return load_json_object(body, max_bytes=MAX_FRAME_BYTES) if len(body) == length else None
