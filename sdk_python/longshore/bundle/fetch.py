"""Fetches parts of a bundle's files from an edge over HTTP, with bounds on bytes and time.

Follows no redirect, reads no more than was asked for, and believes nothing that it reads: the digests are
download's to check.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, urlsplit

from longshore.bundle.check import SAFE_NAME
from longshore.errors import (
    BundleDamagedError,
    ConfigError,
    ConnectionFailedError,
    DeadlineExceededError,
    LongshoreError,
    ProtocolError,
    UpstreamError,
    from_body,
)
from longshore.watchdog import Watch, Watchdog
from longshore.wire import BundleFile, load_json

CONNECT_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 30.0
_BLOCK_BYTES = 64 * 1024  # each has to come within STALL_TIMEOUT_S, so a trickle ends too
_MAX_ERROR_BYTES = 64 * 1024


class BundleChangedError(UpstreamError):
    """The edge has another version of the file than its manifest said."""


class BundleServer:
    """One bundle at `URL/bundles/NAME`; not for several threads at once.

    Raises ConnectionFailedError or UpstreamError where the connection is at fault and trying again may help,
    ProtocolError where it won't, DeadlineExceededError at `deadline_s` of `clock`, BundleDamagedError for a
    length that the manifest contradicts, and the edge's own error where it sent one.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = _split(url)
        self.name = parts.path.rstrip("/").rpartition("/")[2]
        self._path = parts.path.rstrip("/")
        self._node = parts.netloc
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "longshore"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._deadline_s = deadline_s
        self._clock = clock
        self._watchdog = Watchdog(clock)
        assert parts.hostname is not None
        if parts.scheme == "https":
            context = ssl_context or ssl.create_default_context()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S
            )

    def close(self) -> None:
        """Close the connection and end the watch over it."""
        self._connection.close()
        self._watchdog.close()

    def small_file(self, name: str, max_bytes: int) -> bytes | None:
        """A whole file of at most `max_bytes`; None where the edge has none of that name."""
        with self._response(name, {}) as (response, watch):
            if response.status == 404:
                return None
            self._expect(response, 200)
            body = b"".join(self._blocks(response, watch, max_bytes + 1))
            if len(body) > max_bytes:
                raise BundleDamagedError(f"{name}: the edge sends more than {max_bytes} bytes")
            if response.length:
                raise UpstreamError(f"{self._node}: {name} broke off at byte {len(body)}")
            return body

    def part(self, file: BundleFile, first: int, end: int) -> Generator[tuple[int, bytes], None, None]:
        """(offset, bytes) in order: from `first` to `end`, or the whole file if the edge prefers that."""
        etag = f'"{file.sha256}"'
        headers = {"Range": f"bytes={first}-{end - 1}", "If-Range": etag}
        with self._response(file.path, headers) as (response, watch):
            if response.status != 206:
                self._expect(response, 200)
                first, end = 0, file.size_bytes
            elif response.headers.get("Content-Range") != f"bytes {first}-{end - 1}/{file.size_bytes}":
                raise ProtocolError(f"{self._node}: {file.path}: another range than the one asked for")
            if response.headers.get("ETag", etag) != etag:
                raise BundleChangedError(f"{self._node}: {file.path} changed while it was downloaded")
            if response.length is not None and response.length != end - first:
                raise BundleDamagedError(f"{file.path} does not have {file.size_bytes} bytes on the edge")
            for block in self._blocks(response, watch, end - first):
                yield first, block
                first += len(block)
            if first < end:
                raise UpstreamError(f"{self._node}: {file.path} broke off at byte {first}")
            if response.length is None and response.read(1):
                raise BundleDamagedError(f"{file.path} has more than {file.size_bytes} bytes on the edge")

    @contextmanager
    def _response(
        self, name: str, headers: dict[str, str]
    ) -> Iterator[tuple[http.client.HTTPResponse, Watch]]:
        """Errors of the connection in words of ours; it serves another request if this one was read whole."""
        watch: Watch | None = None
        response: http.client.HTTPResponse | None = None
        try:
            watch = self._connect()
            self._connection.request("GET", f"{self._path}/{name}", headers=self._headers | headers)
            response = self._connection.getresponse()
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ProtocolError(f"{self._node}: {name} comes in an encoding that was not asked for")
            yield response, watch
        except ssl.SSLCertVerificationError as error:
            raise ProtocolError(f"{self._node}: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(error, watch) from None
        finally:
            if watch is not None:
                self._watchdog.release(watch)
            if response is None or not response.isclosed():
                self._connection.close()
            if response is not None:
                response.close()  # it owns the socket where the edge closes after each answer

    def _connect(self) -> Watch:
        if self._clock() >= self._deadline_s:
            raise DeadlineExceededError(f"{self._node}: the download took longer than it was given")
        if self._connection.sock is None:
            self._connection.timeout = min(CONNECT_TIMEOUT_S, self._deadline_s - self._clock())
            self._connection.connect()
        sock: socket.socket = self._connection.sock
        sock.settimeout(STALL_TIMEOUT_S)
        return self._watchdog.watch(sock, self._next_stop_s())

    def _next_stop_s(self) -> float:
        return min(self._deadline_s, self._clock() + STALL_TIMEOUT_S)

    def _blocks(self, response: http.client.HTTPResponse, watch: Watch, max_bytes: int) -> Iterator[bytes]:
        while max_bytes > 0 and (block := response.read(min(max_bytes, _BLOCK_BYTES))):
            self._watchdog.move(watch, self._next_stop_s())
            max_bytes -= len(block)
            yield block
        if watch.fired:
            raise self._failure(TimeoutError(), watch)

    def _expect(self, response: http.client.HTTPResponse, status: int) -> None:
        if response.status == status:
            return
        if 300 <= response.status < 400:
            raise ProtocolError(f"{self._node}: it answers with a redirect, which is not followed")
        if response.status < 300:
            raise ProtocolError(f"{self._node}: it answers {response.status}, not {status}")
        try:
            body = load_json(response.read(_MAX_ERROR_BYTES))
        except LongshoreError:
            body = None
        raise from_body(response.status, body)

    def _failure(self, error: Exception, watch: Watch | None) -> LongshoreError:
        if self._clock() >= self._deadline_s:
            return DeadlineExceededError(f"{self._node}: the download took longer than it was given")
        if watch is None:
            return ConnectionFailedError(f"{self._node}: {error or type(error).__name__}")
        if watch.fired or isinstance(error, TimeoutError):
            return UpstreamError(f"{self._node}: nothing came for {STALL_TIMEOUT_S:g} s")
        return UpstreamError(f"{self._node}: {type(error).__name__}: {error}".rstrip(": "))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_plain = parts.hostname and parts.port != 0 and "@" not in parts.netloc and url.isascii()
    except ValueError:
        raise ConfigError(f"{url[:200]!r} is no URL") from None
    if parts.scheme not in ("http", "https") or not is_plain or parts.query or parts.fragment:
        raise ConfigError("the URL of a bundle is like https://edge.example/bundles/NAME, and nothing more")
    if not all(SAFE_NAME.match(part) for part in parts.path.strip("/").split("/")):
        raise ConfigError("the URL of a bundle ends in its name")
    return parts
