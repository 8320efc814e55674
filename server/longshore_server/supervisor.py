"""The supervisor of a core: starts the engine process and the HTTP workers, restarts what dies, stops all.

It answers no request and loads no model, so that nothing a request does can end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from longshore.errors import ConfigError
from longshore_server.child import Child, ending_words
from longshore_server.config import CoreConfig, to_json
from longshore_server.handoff import HANDOFF_VARIABLE, Handoff, write_handoff
from longshore_server.listener import bind_listener, listener_url, local_address
from longshore_server.model_folder import check_model_folder
from longshore_server.restarts import RestartBudget
from longshore_server.telemetry import shared

EXIT_CONFIG = 2
EXIT_FAILED = 1
ENGINE_STOP_S = 5.0
WORKER_READY_S = 120.0
READY_POLL_S = 0.05
READY_ANSWER_S = 5.0
_MAX_SOCKET_PATH_BYTES = 100  # sun_path holds 108 on Linux, 104 elsewhere (unix(7))

Say = Callable[[str], None]


class _Stop(Exception):
    """Ends the supervisor with an exit code and, where there is something to say, one line."""

    def __init__(self, code: int, line: str = "") -> None:
        super().__init__(line)
        self.code = code
        self.line = line


class Supervisor:
    """One core's processes. `run` returns the exit code once all of them are gone."""

    def __init__(self, config: CoreConfig, listener: socket.socket, folder: Path, *, say: Say) -> None:
        self._config = config
        self._listener = listener
        self._say = say
        self._socket_path = folder / "engine"
        self._is_stopping = False
        self._stop: asyncio.Future[_Stop] | None = None
        self._engine = self._engine_child()
        self._workers = [self._worker_child(folder, index) for index in range(config.workers)]
        self._is_engine_ready = False
        self._was_engine_ready = False
        self._ready_workers: set[str] = set()
        self._news = asyncio.Event()

    async def run(self) -> int:
        """Serves until a signal, or until a process keeps dying."""
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        tasks = [
            asyncio.create_task(self._keep_engine(), name="engine"),
            *(asyncio.create_task(self._keep_worker(worker), name=worker.name) for worker in self._workers),
            asyncio.create_task(self._announce(), name="announce"),
        ]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        stop = await self._stop
        if stop.line:
            self._say(f"longshore: {stop.line}")
        await self._end_children()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return stop.code

    # -- ending --------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._is_stopping:  # asked twice: no more patience
            self._kill_all()
        self._end(_Stop(0))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            bug = f"the supervisor failed: {type(error).__name__}: {error}"
            self._end(error if isinstance(error, _Stop) else _Stop(EXIT_FAILED, bug))

    def _end(self, stop: _Stop) -> None:
        self._is_stopping = True
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(stop)

    async def _end_children(self) -> None:
        """Workers drain first, since they need the engine; each wait is bounded."""
        self._listener.close()  # the last to hold it: new connections are refused from here on
        for worker in self._workers:
            worker.terminate()
        await asyncio.gather(*(worker.end_within(self._config.drain_timeout_s) for worker in self._workers))
        self._engine.let_go()
        await self._engine.end_within(ENGINE_STOP_S)

    def _kill_all(self) -> None:
        for child in (*self._workers, self._engine):
            child.kill()

    # -- the engine ----------------------------------------------------------------------------

    def _engine_child(self) -> Child:
        settings = dataclasses.replace(self._config, keys=(), edges=())  # a command line is public
        arguments = ["--socket", str(self._socket_path), "--config-json", to_json(settings).decode()]
        return Child("engine", "longshore_server.engine_process", arguments)

    async def _keep_engine(self) -> None:
        budget = RestartBudget(self._config.engine_max_restarts, self._config.engine_restart_window_s)
        while not self._is_stopping:
            await self._engine.start()
            error = await self._listen_to_engine()
            code = await self._engine.wait()
            if self._is_stopping:
                return
            self._is_engine_ready = False
            if not self._was_engine_ready:
                raise _Stop(EXIT_CONFIG, error) if error else _early_end("engine process", code)
            reason = f"{ending_words(code)}: {error}" if error else ending_words(code)
            await self._pause(budget, "engine process", reason)

    async def _listen_to_engine(self) -> str:
        """Follows what the engine tells until it ends; kills it when it is silent for too long."""
        error = ""
        while True:
            patience_s = self._config.engine_silence_s
            if not self._is_engine_ready:
                patience_s = self._config.engine_start_timeout_s
            try:
                status = await asyncio.wait_for(self._engine.next_status(), patience_s)
            except TimeoutError:
                error = f"it gave no sign of life for {patience_s:.0f} s"
                self._engine.kill()
                continue
            if status is None:
                return error
            if "ready" in status:
                self._is_engine_ready = self._was_engine_ready = True
                self._news.set()
            error = str(status.get("error", error))

    # -- the workers ---------------------------------------------------------------------------

    def _worker_child(self, folder: Path, index: int) -> Child:
        handoff = folder / "handoff"
        if index == 0:
            write_handoff(Handoff(self._config, str(self._socket_path)), handoff)
        descriptor = self._listener.fileno()
        return Child(
            f"HTTP worker {index + 1}",
            "longshore_server.http_worker",
            ["--listener", str(descriptor)],
            environment={HANDOFF_VARIABLE: str(handoff), **shared.prepare(folder)},
            pass_fds=[descriptor],
        )

    async def _keep_worker(self, worker: Child) -> None:
        budget = RestartBudget(self._config.engine_max_restarts, self._config.engine_restart_window_s)
        while not self._is_stopping:
            await worker.start()
            while (status := await worker.next_status()) is not None:
                if "ready" in status:
                    self._ready_workers.add(worker.name)
                    self._news.set()
            code = await worker.wait()
            if self._is_stopping:
                return
            if code == EXIT_CONFIG:
                raise _Stop(EXIT_CONFIG)  # it has said why
            await self._pause(budget, worker.name, ending_words(code))

    async def _pause(self, budget: RestartBudget, name: str, ending: str) -> None:
        delay_s = budget.next_delay_s(time.monotonic())
        if delay_s is None:
            count, window_s = self._config.engine_max_restarts, self._config.engine_restart_window_s
            raise _Stop(
                EXIT_FAILED, f"the {name} died more than {count} times in {window_s:.0f} s; giving up"
            )
        self._say(f"longshore core: the {name} {ending}; restarting it")
        await asyncio.sleep(delay_s)

    # -- readiness -----------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Prints the one line on standard output once all workers are ready and a client is told so."""
        address = local_address(self._listener)
        url = listener_url(self._listener, self._config.host)
        await self._wait_until(lambda: self._was_engine_ready)
        try:
            async with asyncio.timeout(WORKER_READY_S):
                await self._wait_until(lambda: len(self._ready_workers) == len(self._workers))
                while not await _says_ready(address):
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            words = f"the HTTP workers were not ready {WORKER_READY_S:.0f} s after the engine"
            raise _Stop(EXIT_FAILED, words) from None
        sys.stdout.write(f"longshore core ready on {url}\n")
        sys.stdout.flush()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()


def serve(config: CoreConfig, *, say: Say | None = None) -> int:
    """Runs a core until it is stopped; returns the exit code.

    `say` takes lines for people and writes to standard error by default. Raises ConfigError for what stops a
    start: a model that can't be served, a taken port.
    """
    check_model_folder(config)
    say = say or _say_on_stderr
    listener = bind_listener(config.host, config.port)
    folder = Path(tempfile.mkdtemp(prefix="longshore-"))  # mode 0700
    try:
        if len(os.fsencode(folder)) > _MAX_SOCKET_PATH_BYTES - 10:
            raise ConfigError(f"the temporary folder's path is too long for a socket: {folder}")
        if not config.keys and not config.edges:
            say("longshore core: no keys and no edges are configured, so every /v1 request will be refused")
        return asyncio.run(Supervisor(config, listener, folder, say=say).run())
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def _say_on_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _early_end(name: str, code: int) -> _Stop:
    return _Stop(EXIT_FAILED, f"the {name} {ending_words(code)} before it was ready")


async def _says_ready(address: tuple[str, int]) -> bool:
    """Whether GET /readyz answers 200 now."""
    try:
        async with asyncio.timeout(READY_ANSWER_S):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
    return status.split(b" ")[1:2] == [b"200"]
