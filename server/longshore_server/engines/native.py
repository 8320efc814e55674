"""The native engine as an HTTP worker sees it: one connection to the engine process, many jobs over it.

Owns the connection, what is in flight, and bringing that back when the engine process dies. It never loads a
model. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import AsyncIterator
from itertools import count

from longshore.errors import (
    DeadlineExceededError,
    EngineFailedError,
    InternalError,
    LongshoreError,
    ProtocolError,
    UnavailableError,
    from_body,
)
from longshore_server.config import CoreConfig
from longshore_server.engines.base import EngineStats, EngineToken, GenerateJob, ModelInfo
from longshore_server.engines.in_flight import InFlight, engine_token
from longshore_server.ipc import (
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
    TokenItem,
    Tokens,
    WorkerMessage,
    check_peer,
    decode_engine_message,
    to_frame,
)

logger = logging.getLogger(__name__)

READY_SILENCE_S = 1.0
MAX_UNSENT_BYTES = 256 * 1024 * 1024  # after a restart all jobs in flight go out at once, with their pictures
_READ_BYTES = 256 * 1024
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_STATS_TIMEOUT_S = 2.0
_DEADLINE_GRACE_S = 1.0
_RETRY_AFTER_S = 1.0


class NativeEngineClient:
    """Engine over the socket of an engine process.

    When the process dies, jobs in flight go on with the next one from the tokens received so far, exactly,
    since sampling depends on (seed, position) alone. A job is replayed `max_replays` times at most; if the
    dead engine had one job on trial, that one alone is charged. `replay_wait_s` bounds the wait for the next
    engine. A reader that is `max_unread_tokens` behind has its job taken out of the engine until it has
    caught up.
    """

    def __init__(
        self,
        socket_path: str,
        *,
        worker: str = "worker",
        max_replays: int = 1,
        silence_s: float = 10.0,
        start_timeout_s: float = 1800.0,
        replay_wait_s: float = 120.0,
        max_unread_tokens: int = 4096,
    ) -> None:
        self._socket_path = socket_path
        self._worker = worker
        self._max_replays = max_replays
        self._silence_s = silence_s
        self._start_timeout_s = start_timeout_s
        self._replay_wait_s = replay_wait_s
        self._max_unread_tokens = max_unread_tokens
        self._numbers = count()
        self._jobs: dict[InFlight, None] = {}  # in order of arrival
        self._streams: dict[int, InFlight] = {}
        self._ready: Ready | None = None
        self._first_ready = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._heard_s = float("-inf")
        self._lost_s: float | None = None
        self._stats_waiters: dict[int, asyncio.Future[EngineStats]] = {}
        self._task: asyncio.Task[None] | None = None
        self._num_restarts = 0
        self._num_replays = 0

    @classmethod
    def from_config(
        cls, socket_path: str, config: CoreConfig, *, worker: str = "worker"
    ) -> NativeEngineClient:
        """A client with a core's settings."""
        return cls(
            socket_path,
            worker=worker,
            max_replays=config.max_replays,
            silence_s=config.engine_silence_s,
            start_timeout_s=config.engine_start_timeout_s,
            replay_wait_s=config.replay_wait_s,
        )

    # -- Engine --------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """The model; raises UnavailableError before the engine has told of it."""
        return self._told().info

    @property
    def capabilities(self) -> frozenset[str]:
        """What the engine process can do; raises UnavailableError before it has told."""
        return self._told().capabilities

    def is_ready(self) -> bool:
        """True while the engine process is connected and has given a sign of life within a second."""
        return self._is_connected and time.monotonic() - self._heard_s < READY_SILENCE_S

    async def start(self) -> None:
        """Connects, waiting for an engine that is still loading; raises UnavailableError at last."""
        self._task = asyncio.create_task(self._keep_connected(), name="engine-connection")
        try:
            await asyncio.wait_for(self._first_ready.wait(), self._start_timeout_s)
        except TimeoutError:
            await self.close()
            raise UnavailableError(f"the engine was not ready within {self._start_timeout_s:.0f} s") from None

    async def close(self) -> None:
        """Disconnects; jobs in flight end with UnavailableError."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._writer is not None:
            self._lose_connection()
        self._fail_all(UnavailableError("this worker is stopping"))

    async def stats(self) -> EngineStats:
        """The engine's counters as of its last step; raises UnavailableError while there is no engine."""
        serial = next(self._numbers)
        waiter = asyncio.get_running_loop().create_future()
        self._stats_waiters[serial] = waiter
        try:
            self._write(StatsRequest(serial))
            stats = await asyncio.wait_for(waiter, _STATS_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError("the engine does not tell its figures") from None
        finally:
            del self._stats_waiters[serial]
        return dataclasses.replace(stats, num_restarts=self._num_restarts, num_replays=self._num_replays)

    async def generate(self, job: GenerateJob) -> AsyncIterator[EngineToken]:
        """The job's tokens; see Engine. Raises UnavailableError at once while there is no engine."""
        flight = InFlight(job)
        self._submit(flight)
        self._jobs[flight] = None
        timer = self._deadline_timer(flight)
        try:
            while True:
                token = await self._next(flight)
                yield token
                if token.finish_reason is not None:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            self._jobs.pop(flight, None)
            self._withdraw(flight)

    # -- one job -------------------------------------------------------------------------------

    async def _next(self, flight: InFlight) -> EngineToken:
        while not flight.unread:
            if flight.error is not None:
                raise flight.error
            if flight.is_parked:
                flight.is_parked = False
                if self._is_connected:  # else the next engine gets it, as it gets the others
                    self._submit(flight)
            flight.news.clear()
            await flight.news.wait()
        return flight.unread.popleft()

    def _deadline_timer(self, flight: InFlight) -> asyncio.TimerHandle | None:
        """Ends the job a little after its deadline, which the engine keeps itself unless it is dead."""
        if flight.job.deadline_s is None:
            return None
        delay_s = flight.job.deadline_s + _DEADLINE_GRACE_S - time.monotonic()
        return asyncio.get_running_loop().call_later(delay_s, self._expire, flight)

    def _expire(self, flight: InFlight) -> None:
        self._withdraw(flight)
        num_tokens = len(flight.received)
        words = f"the deadline passed after {num_tokens} tokens"
        flight.fail(DeadlineExceededError(words, tokens_delivered=num_tokens))

    def _submit(self, flight: InFlight, *, replay: bool = False) -> None:
        job = flight.job
        remaining_s = None if job.deadline_s is None else job.deadline_s - time.monotonic()
        stream = next(self._numbers)
        self._write(
            Submit(
                stream=stream,
                request_id=job.request_id,
                prompt_token_ids=job.prompt_token_ids,
                params=job.params,
                tenant=job.tenant,
                priority=job.priority,
                remaining_s=remaining_s,
                continue_from=flight.continue_from,
                replay=replay,
                images=job.images,
            )
        )
        flight.stream = stream
        flight.was_resumed = flight.was_resumed or bool(flight.received)
        self._streams[stream] = flight

    def _withdraw(self, flight: InFlight) -> None:
        """Takes a job out of the engine, if it is there and has not ended."""
        is_known = self._streams.pop(flight.stream, None) is not None
        if is_known and not flight.has_ended:
            with contextlib.suppress(UnavailableError):  # no engine, nothing to abort
                self._write(Abort(flight.stream))
        flight.stream = -1

    # -- messages ------------------------------------------------------------------------------

    def _told(self) -> Ready:
        if self._ready is None:
            raise UnavailableError("the engine is still loading", retry_after_s=_RETRY_AFTER_S)
        return self._ready

    @property
    def _is_connected(self) -> bool:
        return self._writer is not None and not self._writer.transport.is_closing()

    def _write(self, message: WorkerMessage) -> None:
        writer = self._writer
        if writer is None or not self._is_connected:
            raise UnavailableError("the engine is not running", retry_after_s=_RETRY_AFTER_S)
        if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise UnavailableError("the engine takes no requests", retry_after_s=_RETRY_AFTER_S)
        writer.write(to_frame(message))

    def _take(self, message: EngineMessage) -> None:
        if isinstance(message, Tokens):
            for item in message.items:
                self._take_token(item)
        elif isinstance(message, Failed):
            self._take_failure(message)
        elif isinstance(message, StatsReply):
            waiter = self._stats_waiters.get(message.serial)
            if waiter is not None and not waiter.done():
                waiter.set_result(message.stats)
        elif isinstance(message, Refused):
            raise ProtocolError(f"the engine closed the connection: {message.message}")
        elif not isinstance(message, Heartbeat):
            raise ProtocolError(f"{type(message).__name__} is out of place")

    def _take_token(self, item: TokenItem) -> None:
        flight = self._streams.get(item.stream)
        if flight is None:
            return  # withdrawn while it was under way
        if item.offset != flight.next_offset:
            self._withdraw(flight)
            flight.fail(InternalError(f"token {item.offset} came where {flight.next_offset} was due"))
            return
        flight.take(engine_token(item, was_resumed=flight.was_resumed))
        if flight.has_ended:
            del self._streams[item.stream]
        elif len(flight.unread) >= self._max_unread_tokens:
            self._withdraw(flight)
            flight.is_parked = True

    def _take_failure(self, message: Failed) -> None:
        flight = self._streams.pop(message.stream, None)
        if flight is not None:
            error = {"message": message.message, "code": message.code, "param": message.param}
            body = {"error": error | {"retry_after_s": message.retry_after_s}}
            failure = from_body(500, body)
            failure.tokens_delivered = len(flight.received) or None
            flight.fail(failure)

    # -- the connection ------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await self._serve_connection()
            except (OSError, TimeoutError, ProtocolError) as error:
                logger.info("no engine: %s", error or type(error).__name__)
            if self._writer is not None:
                backoff_s = _FIRST_BACKOFF_S
                self._lose_connection()
            self._give_up_on_late_engine()
            await asyncio.sleep(backoff_s * random.uniform(0.8, 1.2))
            backoff_s = min(backoff_s * 1.6, _MAX_BACKOFF_S)

    async def _serve_connection(self) -> None:
        reader, writer = await asyncio.wait_for(
            asyncio.open_unix_connection(self._socket_path), HELLO_TIMEOUT_S
        )
        decoder = FrameDecoder()
        try:
            check_peer(writer.get_extra_info("socket"))
            writer.write(to_frame(Hello(PROTOCOL_VERSION, self._worker)))
            while data := await self._read(reader):
                self._heard_s = time.monotonic()
                for frame in decoder.feed(data):
                    message = decode_engine_message(frame)
                    if self._writer is None:
                        self._begin(message, writer)
                    else:
                        self._take(message)
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        async with asyncio.timeout(HELLO_TIMEOUT_S if self._writer is None else self._silence_s):
            return await reader.read(_READ_BYTES)

    def _begin(self, message: EngineMessage, writer: asyncio.StreamWriter) -> None:
        if not isinstance(message, Ready):
            raise ProtocolError(f"{type(message).__name__} came where ready was due")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"the engine speaks version {message.version}, not {PROTOCOL_VERSION}")
        if self._ready is not None and message.info.digest != self._ready.info.digest:
            self._fail_all(EngineFailedError("the engine came back with another model"))
        is_new = self._ready is not None and message.incarnation != self._ready.incarnation
        self._num_restarts += is_new
        self._ready = message
        self._writer = writer
        self._lost_s = None
        self._replay(message.blamed if is_new else "")
        self._first_ready.set()

    def _lose_connection(self) -> None:
        """From here on the engine counts as gone; jobs keep what they have and wait for the next one."""
        self._writer = None
        self._lost_s = time.monotonic()
        self._streams.clear()
        for flight in self._jobs:
            flight.stream = -1
        for waiter in self._stats_waiters.values():
            if not waiter.done():
                waiter.set_exception(UnavailableError("the engine is not running"))

    def _replay(self, blamed: str) -> None:
        """Hands the jobs that have not ended to the new engine, or ends them where their replays are used up.

        The blamed request alone pays for the engine's death; if none is, all that were in it do.
        """
        for flight in self._jobs:
            if flight.has_ended or flight.is_parked:
                continue
            if not blamed or flight.job.request_id == blamed:
                flight.num_replays += 1
            if flight.num_replays > self._max_replays:
                flight.fail(flight.killed_engine())
                continue
            self._num_replays += 1
            try:
                self._submit(flight, replay=True)
            except LongshoreError as error:
                flight.fail(error)

    def _give_up_on_late_engine(self) -> None:
        if self._lost_s is not None and time.monotonic() - self._lost_s > self._replay_wait_s:
            self._fail_all(EngineFailedError(f"no engine came back within {self._replay_wait_s:.0f} s"))

    def _fail_all(self, error: LongshoreError) -> None:
        for flight in self._jobs:
            flight.fail(type(error)(error.message, tokens_delivered=len(flight.received)))
