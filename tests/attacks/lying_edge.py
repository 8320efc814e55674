"""An edge that serves a bundle folder and lies about one thing; a thread for each connection."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)


@dataclass
class Answer:
    """What an honest edge would send; a lie changes it."""

    path: str
    whole: bytes
    first: int
    end: int
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterator[bytes] | None = None

    def set_default(self) -> None:
        self.headers = {"ETag": f'"{hashlib.sha256(self.whole).hexdigest()}"'}
        self.headers["Content-Length"] = str(self.end - self.first)
        if self.status == 206:
            self.headers["Content-Range"] = f"bytes {self.first}-{self.end - 1}/{len(self.whole)}"
        self.body = iter([self.whole[self.first : self.end]])


Lie = Callable[[Answer], None]


class LyingEdge:
    """Serves `folder` below `/bundles/NAME`; `asked` are the (path, first, end) of each request."""

    def __init__(
        self,
        folder: Path,
        name: str,
        lie: Lie = lambda answer: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.folder = folder
        self.lie = lie
        self.asked: list[tuple[str, int, int]] = []
        self.num_connections = 0
        self._tls = tls
        self._prefix = f"/bundles/{name}/"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        port = self._listener.getsockname()[1]
        return f"http{'s' if self._tls else ''}://127.0.0.1:{port}{self._prefix.rstrip('/')}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock, self._wrapped(sock) as sock:
            while head := self._head(sock):
                self._reply(sock, head)

    def _wrapped(self, sock: socket.socket) -> socket.socket:
        return self._tls.wrap_socket(sock, server_side=True) if self._tls is not None else sock

    @staticmethod
    def _head(sock: socket.socket) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = sock.recv(65536)
            if not data:
                return b""
            head += data
        return head

    def _reply(self, sock: socket.socket, head: bytes) -> None:
        path = head.split(b" ", 2)[1].decode().removeprefix(self._prefix)
        file = self.folder / path
        whole = file.read_bytes() if file.is_file() else b""
        found = _RANGE.search(head)
        first, end = (int(found[1]), int(found[2]) + 1) if found and whole else (0, len(whole))
        self.asked.append((path, first, end))
        answer = Answer(path, whole, first, end, 404 if not file.is_file() else 206 if found else 200)
        answer.set_default()
        self.lie(answer)
        fields = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        sock.sendall(f"HTTP/1.1 {answer.status} Words\r\n{fields}\r\n".encode())
        for piece in answer.body or ():
            sock.sendall(piece)
        if "Content-Length" not in answer.headers:
            sock.close()
