"""The core's listening socket: bound once, by the supervisor, so that a taken port is known early."""

from __future__ import annotations

import errno
import os
import socket

from longshore.errors import ConfigError


def bind_listener(host: str, port: int, *, backlog: int = 1024) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises ConfigError where there is none to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"host: {host!r} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # A restart may bind while connections of the last run are in TIME_WAIT; a live listener refuses.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(_reason(error, host, port)) from None
    listener.setblocking(False)
    return listener


def listener_url(listener: socket.socket, host: str) -> str:
    """The URL to print: the host as it was set, the port as it came to be."""
    return f"http://{_bracketed(host)}:{listener.getsockname()[1]}"


def local_address(listener: socket.socket) -> tuple[str, int]:
    """Where this machine itself reaches the socket, also when it listens on every address."""
    host, port = listener.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {port} on {host} is taken by another process"
    if error.errno == errno.EACCES:
        return f"port: this user may not listen on {port}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host: {host} is no address of this machine"
    return f"port: can't listen on {host}:{port}: {os.strerror(error.errno or 0)}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
