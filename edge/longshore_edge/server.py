"""Starts and stops the edge's processes: checks the settings, takes the port, runs granian's workers.

HTTP/1.1, HTTP/2 and WebSocket on one port. Answers no request itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longshore.errors import BundleError, ConfigError
from longshore_edge.app import EdgeApp
from longshore_edge.bundles import BundleShelf
from longshore_edge.config import EdgeConfig
from longshore_edge.geo import GeoDatabase
from longshore_edge.student import check_student, open_student
from longshore_edge.worker import Worker, prepare_state

_READY_TIMEOUT_S = 60.0
_READY_INTERVAL_S = 0.02


def make_app(config: EdgeConfig, state_dir: Path) -> EdgeApp:
    """The application of one worker process."""

    async def start() -> Worker:
        worker = Worker(config, state_dir)
        await worker.start()
        return worker

    return EdgeApp(start)


def check_start(config: EdgeConfig) -> None:
    """Open what the workers will open; raises ConfigError with one line for what can't be."""
    if config.geo_db is not None:
        GeoDatabase(Path(config.geo_db)).close()
    BundleShelf(config.bundles)
    note = _check_student(config)
    if config.cache_path is not None and not Path(config.cache_path).parent.is_dir():
        raise ConfigError(f"cache_path: there is no folder {Path(config.cache_path).parent}")
    if note:
        print(f"longshore edge: {note}", file=sys.stderr, flush=True)  # noqa: T201


def _check_student(config: EdgeConfig) -> str:
    """What the log should know of the student, all of which was checked."""
    if config.student_bundle is None:
        return ""
    try:
        open_student(config)
        return check_student(config)
    except BundleError as error:
        raise ConfigError(f"student_bundle: {error.message}") from None


def serve(config: EdgeConfig) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. Raises ConfigError before anything is started."""
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.http import HTTP2Settings
    from granian.log import LogLevels

    check_start(config)
    with tempfile.TemporaryDirectory(prefix="longshore-edge-") as folder, _held_port(config) as port:
        server = Granian(
            "longshore_edge",
            address=config.host,
            port=port,
            interface=Interfaces.ASGI,
            workers=config.workers,
            http=HTTPModes.auto,
            loop=Loops.auto,
            websockets=True,
            backlog=1024,
            backpressure=config.max_in_flight + config.max_sockets,
            http2_settings=HTTP2Settings(max_headers_size=64 * 1024),
            log_level=LogLevels.warning,
            log_access=False,
            workers_kill_timeout=config.drain_s,
            respawn_failed_workers=True,
            respawn_interval=0.1,
        )
        prepare_state(config, Path(folder))
        announcer = threading.Thread(target=_announce, args=(server, config, port), daemon=True)
        announcer.start()
        loader = functools.partial(make_app, config, Path(folder))
        try:
            server.serve(target_loader=loader, wrap_loader=False)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
    return 0


@contextlib.contextmanager
def _held_port(config: EdgeConfig) -> Iterator[int]:
    """A port that is ours: granian's listeners share theirs with anyone of this user who asks.

    So the port is first bound alone, which fails if somebody listens there, and then held by a
    socket that never listens.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((config.host, config.port))
            port = int(alone.getsockname()[1])
        held = socket.socket(family, socket.SOCK_STREAM)
        with held:
            if hasattr(socket, "SO_REUSEPORT"):
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                held.bind((config.host, port))
            yield port
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"can't listen on {config.host}:{config.port}: {why}") from None


def _announce(server: Any, config: EdgeConfig, port: int) -> None:
    """Say on stdout where the edge listens, once it does.

    Until the workers are forked this thread only sleeps: a lock held at the fork is held in the
    worker for ever.
    """
    while len(server.wrks) < config.workers:
        time.sleep(_READY_INTERVAL_S)
    host = config.host
    address = f"[{host}]" if ":" in host else host
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, address)
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"http://{reachable}:{port}/healthz", timeout=5.0) as response:
                response.read()
            print(f"longshore edge ready on http://{address}:{port}", flush=True)  # noqa: T201
            return
        except (OSError, urllib.error.URLError):
            time.sleep(_READY_INTERVAL_S)
    print("the edge's workers did not come up", file=sys.stderr, flush=True)  # noqa: T201
