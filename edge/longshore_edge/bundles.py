"""Serves model bundles to devices: the manifest, its signature and the files it lists, nothing else.

Range, ETag, If-Range and HEAD as RFC 9110 has them, so that a broken download goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from longshore.bundle import load_bundle
from longshore.errors import BundleError, ConfigError, NotFoundError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME
from longshore_edge.asgi import JSON, Headers, RequestHeaders, Send, send_bytes
from longshore_edge.config import BundleSettings
from longshore_edge.student import bundle_folder

_PIECE_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file, its size and its strong entity tag (the digest that the manifest gives)."""

    path: Path
    size_bytes: int
    etag: str
    content_type: bytes


class BundleShelf:
    """The bundles of the settings, each checked whole at start. Raises ConfigError for a damaged one."""

    def __init__(self, bundles: tuple[BundleSettings, ...]) -> None:
        self._files: dict[tuple[str, str], ServedFile] = {}
        for settings in bundles:
            folder = bundle_folder(Path(settings.path))
            try:
                self._add(folder)
            except (BundleError, OSError) as error:
                raise ConfigError(f"bundles: {folder}: {error}") from None

    def find(self, path: str) -> ServedFile:
        """The file of `/bundles/NAME/FILE`; raises NotFoundError."""
        _, _, name, file = path.split("/", 3) if path.count("/") >= 3 else ("", "", "", "")
        found = self._files.get((name, file))
        if found is None:
            raise NotFoundError("no such bundle or file")
        return found

    def _add(self, folder: Path) -> None:
        manifest = load_bundle(folder)
        if (manifest.name, MANIFEST_NAME) in self._files:
            raise ConfigError(f"bundles: {manifest.name} stands twice")
        for file in manifest.files:
            self._files[manifest.name, file.path] = ServedFile(
                folder / file.path, file.size_bytes, f'"{file.sha256}"', b"application/octet-stream"
            )
        for name, content_type in ((MANIFEST_NAME, JSON), (SIGNATURE_NAME, b"text/plain")):
            path = folder / name
            if path.is_file():
                body = path.read_bytes()
                tag = f'"{hashlib.sha256(body).hexdigest()}"'
                self._files[manifest.name, name] = ServedFile(path, len(body), tag, content_type)


def byte_range(header: str | None, size_bytes: int) -> tuple[int, int] | bool | None:
    """(first, end) of a single range; None to send the whole; False if it can't be satisfied.

    Several ranges, or a header that can't be read, are answered with the whole, as RFC 9110
    permits.
    """
    match = _RANGE.match(header.replace(" ", "")) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first_text, last_text = match.groups()
    if not first_text:
        length = min(int(last_text), size_bytes)
        return (size_bytes - length, size_bytes) if length else False
    first = int(first_text)
    end = size_bytes if not last_text else min(int(last_text) + 1, size_bytes)
    if last_text and int(last_text) < first:
        return None
    return (first, end) if first < size_bytes else False


async def send_file(send: Send, file: ServedFile, headers: RequestHeaders, *, is_head: bool) -> None:
    """The file or the part of it that was asked for."""
    fields: Headers = [
        (b"etag", file.etag.encode()),
        (b"accept-ranges", b"bytes"),
        (b"cache-control", b"no-cache"),
    ]
    if _matches(headers.get(b"if-none-match"), file.etag):
        await send({"type": "http.response.start", "status": 304, "headers": fields})
        await send({"type": "http.response.body", "body": b""})
        return
    if_range = headers.get(b"if-range")
    wanted = None if if_range not in (None, file.etag) else byte_range(headers.get(b"range"), file.size_bytes)
    if wanted is False:
        fields.append((b"content-range", f"bytes */{file.size_bytes}".encode()))
        await send_bytes(send, b"", status=416, content_type=b"text/plain", headers=fields)
        return
    first, end = (0, file.size_bytes) if not isinstance(wanted, tuple) else wanted
    if wanted is not None:
        fields.append((b"content-range", f"bytes {first}-{end - 1}/{file.size_bytes}".encode()))
    fields += [(b"content-type", file.content_type), (b"content-length", str(end - first).encode())]
    status = 200 if wanted is None else 206
    await send({"type": "http.response.start", "status": status, "headers": fields})
    if is_head:
        await send({"type": "http.response.body", "body": b""})
    else:
        await _send_part(send, file.path, first, end)


async def _send_part(send: Send, path: Path, first: int, end: int) -> None:
    """Piece by piece, read in a thread; the client's pace is the pace of reading."""
    with await asyncio.to_thread(path.open, "rb") as stream:
        await asyncio.to_thread(stream.seek, first)
        left = end - first
        while left > 0:
            piece = await asyncio.to_thread(_read, stream, min(left, _PIECE_BYTES))
            left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
        if first == end:
            await send({"type": "http.response.body", "body": b""})


def _read(stream: BinaryIO, size_bytes: int) -> bytes:
    piece = stream.read(size_bytes)
    if not piece:
        raise OSError("the file became shorter while it was sent")
    return piece


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in header.split(",")]
