"""One HTTP worker process: granian serving the application on the supervisor's listening socket.

`python -m longshore_server.http_worker --listener FD --parent PID`. HTTP/1.1, HTTP/2 and WebSocket share the
port. It owns no engine and no policy; SIGTERM makes it finish what it has begun and end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.log import LogLevels
from granian.server.embed import Server

from longshore.errors import ConfigError
from longshore_server.config import CoreConfig
from longshore_server.handoff import read_handoff
from longshore_server.lifeline import Lifeline
from longshore_server.status_pipe import StatusPipe

EXIT_CONFIG = 2
LISTEN_BACKLOG = 1024


class SharedListenerServer(Server):
    """granian's embedded server on a listening socket that others hold too.

    granian itself would bind a socket per worker with SO_REUSEPORT: then a taken port goes unnoticed, and the
    connections waiting at a worker that dies are lost.
    """

    def __init__(self, app: Any, listener_fd: int, config: CoreConfig) -> None:
        super().__init__(
            app,
            interface=Interfaces.ASGI,
            http=HTTPModes.auto,
            websockets=True,
            backlog=LISTEN_BACKLOG,
            backpressure=max(1, config.max_connections // config.workers),
            log_level=LogLevels.error,  # its one warning is that embedding is experimental
        )
        self._listener_fd = listener_fd

    def _init_shared_socket(self) -> None:
        self._ssp = None
        # file descriptor, whether it is a Unix socket, backlog; its type stub knows of none
        self._shd = SocketHolder(self._listener_fd, False, LISTEN_BACKLOG)  # type: ignore


async def serve(app: Any, listener_fd: int, config: CoreConfig, status: StatusPipe) -> None:
    """Serves until SIGTERM; tells the supervisor once requests would be answered.

    On SIGTERM answers may finish, those that can't are ended with a typed error, and then it stops.
    """
    server = SharedListenerServer(app, listener_fd, config)
    stopping: set[asyncio.Task[None]] = set()

    def on_signal() -> None:
        if not stopping:
            stopping.add(asyncio.create_task(_drain_and_stop(app, server)))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_signal)
    telling = asyncio.create_task(_tell_when_ready(app, status))
    try:
        await server.serve()
    finally:
        telling.cancel()


async def _drain_and_stop(app: Any, server: Server) -> None:
    try:
        await app.state.drain()
    finally:
        server.stop()


async def _tell_when_ready(app: Any, status: StatusPipe) -> None:
    await app.state.parts.has_started.wait()
    status.tell(ready=1)


def _run(app: Any, listener_fd: int, config: CoreConfig, status: StatusPipe) -> None:
    factory = None
    with contextlib.suppress(ImportError):  # not there on Windows; asyncio's own loop will do
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(app, listener_fd, config, status))


def main(argv: list[str] | None = None) -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="longshore_server.http_worker")
    parser.add_argument("--listener", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--parent", type=int, required=True, help="process id to live no longer than")
    arguments = parser.parse_args(argv)
    Lifeline(arguments.parent, sys.stdin.fileno())
    status = StatusPipe()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the supervisor decides
    try:
        config = read_handoff().config
        logging.basicConfig(
            level=config.log_level.upper(), format="longshore core: %(levelname)s %(message)s"
        )
        from longshore_server.app import create_app

        app = create_app()
    except ConfigError as error:
        sys.stderr.write(f"longshore: {error.message}\n")
        return EXIT_CONFIG
    _run(app, arguments.listener, config, status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
