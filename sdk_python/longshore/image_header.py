"""What a picture's first bytes say of it: format, size, animation; read before anything is decoded.

Knows PNG, JPEG and WebP, which is all that any tier takes. Decodes nothing and needs no library.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from longshore.errors import InvalidImageError

MAX_PIXELS = 2**26
MAX_WIRE_PIXELS = 2**24
MAX_SCANS = 100
_MAX_CHUNKS = 4096
_PNG = b"\x89PNG\r\n\x1a\n"
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # of JPEG's markers C0 to CF, those that begin no frame
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length

Kind = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format and stored size in pixels, before any turn that EXIF asks for."""

    kind: Kind
    width_px: int
    height_px: int


def read_header(data: bytes, max_pixels: int = MAX_WIRE_PIXELS) -> ImageHeader:
    """The header of a still picture of at most `max_pixels`.

    Raises InvalidImageError for another format, an animation, a size of nothing or too much, and a JPEG of
    more than 100 scans, each of which costs as much as the whole picture.
    """
    try:
        header = _read(data)
    except (struct.error, IndexError):
        raise InvalidImageError("the picture ends within its header") from None
    check_pixels(header.width_px, header.height_px, max_pixels)
    return header


def check_pixels(width_px: int, height_px: int, max_pixels: int) -> None:
    """InvalidImageError unless there is at least one pixel and at most `max_pixels`."""
    if width_px < 1 or height_px < 1:
        raise InvalidImageError("the picture has no pixels")
    if width_px * height_px > max_pixels:
        raise InvalidImageError(
            f"{width_px} x {height_px} pixels are more than the {max_pixels} that are taken"
        )


def _read(data: bytes) -> ImageHeader:
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    raise InvalidImageError("the picture is neither PNG, JPEG nor WebP")


def _png(data: bytes) -> ImageHeader:
    length, name, width, height = struct.unpack_from(">I4sII", data, 8)
    if (length, name) != (13, b"IHDR"):
        raise InvalidImageError("the PNG does not begin with its header")
    position = 8
    for _ in range(_MAX_CHUNKS):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"acTL":
            raise _animated()
        if name == b"IDAT":
            return ImageHeader("png", width, height)
        position += 12 + length
    raise InvalidImageError("the PNG has too many chunks before its pixels")


def _jpeg(data: bytes) -> ImageHeader:
    # Within coded data a byte FF is never followed by DA, so this counts the scans, or a few too many.
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise InvalidImageError(f"the JPEG has more than {MAX_SCANS} scans")
    position = 2
    for _ in range(_MAX_CHUNKS):
        if data[position] != 0xFF:
            break
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker in _BARE:
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 3)
            return ImageHeader("jpeg", width, height)
        if marker in (0xD9, 0xDA):
            break
        (length,) = struct.unpack_from(">H", data, position)
        position += length
    raise InvalidImageError("the JPEG has no frame before its pixels")


def _webp(data: bytes) -> ImageHeader:
    """The three forms of a WebP file (RFC 9649): lossy, lossless, extended."""
    name = data[12:16]
    if name == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if name == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if name == b"VP8X":
        if data[20] & 0x02:
            raise _animated()
        width, height = (int.from_bytes(_three(data, at), "little") + 1 for at in (24, 27))
        return ImageHeader("webp", width, height)
    raise InvalidImageError("the WebP does not begin with a picture")


def _three(data: bytes, position: int) -> bytes:
    if len(data) < position + 3:
        raise IndexError(position)
    return data[position : position + 3]


def _animated() -> InvalidImageError:
    return InvalidImageError("animated pictures are not taken")
