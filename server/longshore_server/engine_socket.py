"""The engine process's private socket: accepts workers, reads their messages, writes the engine's.

Runs in a thread of its own, so that the engine's thread never waits for a peer. A peer that breaks the rules
or stops reading loses its connection, and only that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

from longshore.errors import ProtocolError
from longshore_server.engine_loop import EngineLoop
from longshore_server.engines.base import ModelInfo
from longshore_server.ipc import (
    HEARTBEAT_INTERVAL_S,
    HELLO_TIMEOUT_S,
    PROTOCOL_VERSION,
    Abort,
    EngineMessage,
    Failed,
    FrameDecoder,
    Heartbeat,
    Hello,
    Ready,
    Refused,
    StatsReply,
    StatsRequest,
    Submit,
    Tokens,
    WorkerMessage,
    check_peer,
    decode_worker_message,
    to_frame,
)

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
MAX_UNREAD_BYTES = 64 * 1024 * 1024
_READ_BYTES = 256 * 1024


class _Connection:
    """One worker. `live` are the streams that it has begun and that have not ended."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.writer = writer
        self.live: set[int] = set()
        self.last_stream = -1
        self.is_greeted = False

    def write(self, message: EngineMessage) -> None:
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.error("worker connection %d does not read; closing it", self.number)
            transport.abort()
            return
        self._note_endings(message)
        self.writer.write(to_frame(message))

    def _note_endings(self, message: EngineMessage) -> None:
        if isinstance(message, Failed):
            self.live.discard(message.stream)
        elif isinstance(message, Tokens):
            self.live.difference_update(item.stream for item in message.items if item.finish_reason)


class EngineSocket:
    """Serves one EngineLoop over a Unix socket at `path`.

    `beat` is called with every heartbeat; `stuck` once, when a step takes longer than `step_timeout_s`.
    """

    def __init__(
        self,
        path: Path,
        info: ModelInfo,
        capabilities: frozenset[str],
        *,
        incarnation: str,
        blamed: str,
        step_timeout_s: float,
        beat: Callable[[], None],
        stuck: Callable[[float], None],
    ) -> None:
        self._path = path
        self._ready = Ready(PROTOCOL_VERSION, incarnation, info, capabilities, blamed)
        self._step_timeout_s = step_timeout_s
        self._beat = beat
        self._stuck = stuck
        self._connections: dict[int, _Connection] = {}
        self._numbers = count(1)
        self._engine_loop: EngineLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._failure: BaseException | None = None

    # -- from the engine's thread --------------------------------------------------------------

    def start(self, engine_loop: EngineLoop) -> None:
        """Listens; raises OSError if it can't."""
        self._engine_loop = engine_loop
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine-socket")
        self._thread.start()
        self._listening.wait()
        if self._failure is not None:
            raise self._failure

    def send(self, connection: int, message: EngineMessage) -> None:
        """Queues a message for a connection; one that is gone is no error."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._write, connection, message)

    def close(self, timeout_s: float = 2.0) -> None:
        """Closes every connection."""
        if self._loop is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)

    # -- in the socket's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            logger.exception("the engine's socket failed")
        finally:
            self._listening.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, path=str(self._path))
        os.chmod(self._path, 0o600)
        self._listening.set()
        heart = asyncio.create_task(self._heartbeats())
        await self._stop.wait()
        heart.cancel()
        server.close()
        for connection in list(self._connections.values()):
            connection.writer.close()

    async def _heartbeats(self) -> None:
        assert self._engine_loop is not None
        while True:
            age_s = self._engine_loop.step_age_s()
            if age_s > self._step_timeout_s:
                self._stuck(age_s)
            self._beat()
            for connection in list(self._connections.values()):
                connection.write(Heartbeat(age_s))
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    def _write(self, number: int, message: EngineMessage) -> None:
        connection = self._connections.get(number)
        if connection is not None:
            connection.write(message)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._engine_loop is not None
        connection = _Connection(next(self._numbers), writer)
        try:
            self._check_newcomer(writer)
            await self._read(connection, reader)
        except ProtocolError as error:
            logger.warning("worker connection %d: %s", connection.number, error)
            connection.write(Refused(error.code, error.message[:1000]))
        except (OSError, TimeoutError):
            logger.info("worker connection %d is gone", connection.number)
        finally:
            self._connections.pop(connection.number, None)
            self._engine_loop.drop(connection.number)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _check_newcomer(self, writer: asyncio.StreamWriter) -> None:
        check_peer(writer.get_extra_info("socket"))
        if len(self._connections) >= MAX_CONNECTIONS:
            raise ProtocolError(f"there are {MAX_CONNECTIONS} connections already")

    async def _read(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        decoder = FrameDecoder()
        while True:
            timeout_s = None if connection.is_greeted else HELLO_TIMEOUT_S
            data = await asyncio.wait_for(reader.read(_READ_BYTES), timeout_s)
            if not data:
                return
            for frame in decoder.feed(data):
                self._take(connection, decode_worker_message(frame))

    def _take(self, connection: _Connection, message: WorkerMessage) -> None:
        assert self._engine_loop is not None
        if isinstance(message, Hello) or not connection.is_greeted:
            self._greet(connection, message)
        elif isinstance(message, Submit):
            self._submit(connection, message)
        elif isinstance(message, Abort):
            if message.stream in connection.live:  # else its ending is on the way to the worker
                connection.live.discard(message.stream)
                self._engine_loop.abort(connection.number, message.stream)
        elif isinstance(message, StatsRequest):
            connection.write(StatsReply(message.serial, self._engine_loop.stats))

    def _greet(self, connection: _Connection, message: WorkerMessage) -> None:
        if not isinstance(message, Hello) or connection.is_greeted:
            raise ProtocolError("hello comes first, and once")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"version {message.version} is spoken; this engine speaks {PROTOCOL_VERSION}")
        connection.is_greeted = True
        self._connections[connection.number] = connection
        connection.write(self._ready)

    def _submit(self, connection: _Connection, message: Submit) -> None:
        assert self._engine_loop is not None
        if message.stream <= connection.last_stream:
            raise ProtocolError(f"stream {message.stream} was used before")
        connection.last_stream = message.stream
        connection.live.add(message.stream)
        self._engine_loop.submit(connection.number, message)
