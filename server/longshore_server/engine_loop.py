"""The engine's own thread: commands in, steps, outputs out. Owns the engine and the order of its requests.

It knows connections by number only; sockets are engine_socket's. A request that fails ends alone, and a step
that raises does not end the loop unless the engine's books no longer agree.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from longshore.errors import DeadlineExceededError, EngineFailedError, LongshoreError, QueueFullError
from longshore_server.engines.base import EngineStats
from longshore_server.ipc import EngineMessage, Failed, Submit, TokenItem, Tokens
from longshore_server.native.errors import InvalidRequestError as NativeInvalidRequestError
from longshore_server.native.errors import PromptTooLongError as NativePromptTooLongError
from longshore_server.native.errors import QueueFullError as NativeQueueFullError
from longshore_server.native.images import ImageInput
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.trial import TrialNote

logger = logging.getLogger(__name__)

MAX_STEP_ERRORS_IN_A_ROW = 3
_QUEUE_FULL_RETRY_AFTER_S = 1.0
_PREPARE_INTERVAL_S = 0.02


class StepEngine(Protocol):
    """What the loop needs of an engine; NativeEngine is one."""

    def add_request(self, request_id: str, prompt_token_ids: Any, params: Any, **options: Any) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def has_unfinished(self) -> bool: ...
    def prepare(self) -> bool: ...
    def step(self) -> list[Any]: ...
    def stats(self) -> Any: ...
    def check_integrity(self) -> None: ...


class EngineBrokenError(Exception):
    """The engine can't go on; the process ends, and a new one takes its requests."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stream:
    connection: int
    number: int
    request_id: str

    @property
    def engine_id(self) -> str:
        return f"{self.connection}.{self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Arrival:
    stream: _Stream
    submit: Submit
    deadline_s: float | None


Command = Callable[[], None]


class EngineLoop:
    """Runs one engine for many connections.

    `send(connection, message)` takes messages from the loop's thread and must not block. `submit`, `abort`,
    `drop` and `stop` may be called from any thread; all else happens in the thread that calls `run`.

    Requests that were running when the engine before this one died come back as replays. They are tried one
    at a time, each until its first output, with its id in `note` meanwhile, and new requests wait until they
    are through: if the engine dies again, it is known which request killed it, and no other pays for it.
    """

    def __init__(
        self,
        engine: StepEngine,
        *,
        send: Callable[[int, EngineMessage], None],
        note: TrialNote,
        max_streams: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._send = send
        self._note = note
        self._max_streams = max_streams
        self._clock = clock
        self._started_s = clock()
        self._wake = threading.Condition()
        self._commands: deque[Command] = deque()  # bounded: one submit and one end for each counted stream
        self._num_streams = 0
        self._is_stopping = False
        self._streams: dict[str, _Stream] = {}
        self._replays: deque[_Arrival] = deque()
        self._held: deque[_Arrival] = deque()
        self._trial: str | None = None
        self._step_started_s: float | None = None
        self._step_s_total = 0.0
        self._step_s_last = 0.0
        self._step_s_max = 0.0
        self._num_step_errors = 0
        self._num_step_errors_in_a_row = 0
        self.stats = EngineStats()
        self._take_stats()

    # -- from any thread -----------------------------------------------------------------------

    def submit(self, connection: int, submit: Submit) -> None:
        """Queues a job; its deadline starts to count here. Over the bound it fails at once."""
        stream = _Stream(connection, submit.stream, submit.request_id)
        deadline_s = None if submit.remaining_s is None else self._clock() + submit.remaining_s
        with self._wake:
            is_full = self._num_streams >= self._max_streams
            if not is_full:
                self._num_streams += 1
                self._commands.append(lambda: self._arrive(_Arrival(stream, submit, deadline_s)))
                self._wake.notify()
        if is_full:
            self._fail(stream, _queue_full(self._max_streams))

    def abort(self, connection: int, number: int) -> None:
        """Ends one stream within one step."""
        self._command(lambda: self._end_stream(f"{connection}.{number}"))

    def drop(self, connection: int) -> None:
        """Ends all streams of a connection within one step."""
        self._command(lambda: self._drop(connection))

    def stop(self) -> None:
        """Makes `run` return after the present step."""
        self._is_stopping = True
        self._command(lambda: None)

    def step_age_s(self) -> float:
        """How long the present step has taken; 0 between steps."""
        started_s = self._step_started_s
        return 0.0 if started_s is None else self._clock() - started_s

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until `stop`; raises EngineBrokenError when the engine can't go on."""
        while not self._is_stopping:
            for command in self._take_commands():
                command()
            self._admit()
            if self._engine.has_unfinished():
                self._step()
            self._take_stats()

    def _command(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _take_commands(self) -> list[Command]:
        """Those that have come. While the engine is idle it waits for one, and the engine prepares."""
        is_idle = not self._engine.has_unfinished()
        timeout_s = _PREPARE_INTERVAL_S if is_idle and self._engine.prepare() else None
        with self._wake:
            if is_idle and not self._commands and not self._is_stopping:
                self._wake.wait(timeout_s)
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _step(self) -> None:
        self._step_started_s = self._clock()
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._step_failed(error)
            return
        finally:
            self._measure_step()
        self._num_step_errors_in_a_row = 0
        self._deliver(outputs)

    def _measure_step(self) -> None:
        assert self._step_started_s is not None
        self._step_s_last = self._clock() - self._step_started_s
        self._step_s_total += self._step_s_last
        self._step_s_max = max(self._step_s_max, self._step_s_last)
        self._step_started_s = None

    def _step_failed(self, error: Exception) -> None:
        logger.exception("a step of the engine failed")
        self._num_step_errors += 1
        self._num_step_errors_in_a_row += 1
        if self._num_step_errors_in_a_row >= MAX_STEP_ERRORS_IN_A_ROW:
            raise EngineBrokenError(f"{MAX_STEP_ERRORS_IN_A_ROW} steps in a row failed: {error}") from error
        try:
            self._engine.check_integrity()
        except AssertionError as books:
            raise EngineBrokenError(
                f"the engine's books do not agree after a failed step: {books}"
            ) from error

    def _deliver(self, outputs: list[Any]) -> None:
        items: dict[int, list[TokenItem]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # aborted: nobody waits for it
            self._end_trial(stream.engine_id)
            if output.finish_reason in ("deadline", "error", "abort"):
                self._forget(stream)
                self._fail(stream, _ending_error(output))
                continue
            if output.finish_reason is not None:
                self._forget(stream)
            items.setdefault(stream.connection, []).append(_token_item(stream.number, output))
        for connection, batch in items.items():
            self._send(connection, Tokens(tuple(batch)))

    # -- requests ------------------------------------------------------------------------------

    def _arrive(self, arrival: _Arrival) -> None:
        self._streams[arrival.stream.engine_id] = arrival.stream
        (self._replays if arrival.submit.replay else self._held).append(arrival)

    def _admit(self) -> None:
        while self._replays and self._trial is None:
            arrival = self._replays.popleft()
            if arrival.stream.engine_id in self._streams:
                self._trial = arrival.stream.engine_id
                self._note.write(arrival.stream.request_id)
                self._add(arrival)
        while self._held and self._trial is None:
            arrival = self._held.popleft()
            if arrival.stream.engine_id in self._streams:
                self._add(arrival)

    def _add(self, arrival: _Arrival) -> None:
        stream, submit = arrival.stream, arrival.submit
        try:
            self._engine.add_request(
                stream.engine_id,
                submit.prompt_token_ids,
                SamplingParams(**_sampling_fields(submit)),
                tenant=submit.tenant,
                priority=submit.priority,
                deadline_s=arrival.deadline_s,
                continue_from=submit.continue_from,
                images=[ImageInput(each.height_px, each.width_px, each.rgb) for each in submit.images],
            )
        except Exception as error:  # one bad request fails alone
            self._end_trial(stream.engine_id)
            self._forget(stream)
            self._send(stream.connection, _failure(stream.number, error))

    def _end_stream(self, engine_id: str) -> None:
        stream = self._streams.get(engine_id)
        if stream is None:
            return  # it ended while the abort was under way
        self._forget(stream)
        self._end_trial(engine_id)
        if not self._engine.abort(engine_id):
            self._replays = _without(self._replays, stream)
            self._held = _without(self._held, stream)

    def _drop(self, connection: int) -> None:
        mine = [engine_id for engine_id, stream in self._streams.items() if stream.connection == connection]
        for engine_id in mine:
            self._end_stream(engine_id)

    def _end_trial(self, engine_id: str) -> None:
        if self._trial == engine_id:
            self._trial = None
            self._note.clear()

    def _forget(self, stream: _Stream) -> None:
        del self._streams[stream.engine_id]
        with self._wake:
            self._num_streams -= 1

    def _fail(self, stream: _Stream, error: LongshoreError) -> None:
        self._send(stream.connection, _failed(stream.number, error))

    def _take_stats(self) -> None:
        counters = self._engine.stats()
        values = {field.name: getattr(counters, field.name) for field in dataclasses.fields(counters)}
        values["num_waiting"] += len(self._replays) + len(self._held)
        self.stats = EngineStats(
            **values,
            step_s_total=self._step_s_total,
            step_s_last=self._step_s_last,
            step_s_max=self._step_s_max,
            num_step_errors=self._num_step_errors,
            uptime_s=self._clock() - self._started_s,
        )


def _without(arrivals: deque[_Arrival], stream: _Stream) -> deque[_Arrival]:
    return deque(arrival for arrival in arrivals if arrival.stream is not stream)


def _sampling_fields(submit: Submit) -> dict[str, Any]:
    return {field.name: getattr(submit.params, field.name) for field in dataclasses.fields(submit.params)}


def _token_item(number: int, output: Any) -> TokenItem:
    return TokenItem(
        stream=number,
        token_id=output.token_id,
        offset=output.offset,
        logprob=output.logprob,
        top_logprobs=output.top_logprobs,
        finish_reason=output.finish_reason,
        num_cached_tokens=output.num_cached_tokens,
        num_prompt_tokens=output.num_prompt_tokens,
    )


def _ending_error(output: Any) -> LongshoreError:
    if output.finish_reason == "deadline":
        return DeadlineExceededError(
            f"the deadline passed after {output.offset} tokens", tokens_delivered=output.offset
        )
    return EngineFailedError(f"the engine failed on this request: {output.error or output.finish_reason}")


def _failure(number: int, error: Exception) -> Failed:
    """What a refused `add_request` means to the client."""
    if isinstance(error, NativePromptTooLongError):
        return Failed(number, "context_length_exceeded", str(error))
    if isinstance(error, NativeInvalidRequestError):
        return Failed(number, "invalid_request", str(error), param=error.field)
    if isinstance(error, NativeQueueFullError):
        return _failed(number, _queue_full(error.max_num_waiting))
    logger.error("a request could not be added", exc_info=error)
    return _failed(number, EngineFailedError(f"the engine refused this request: {type(error).__name__}"))


def _queue_full(bound: int) -> QueueFullError:
    return QueueFullError(f"{bound} requests are already waiting", retry_after_s=_QUEUE_FULL_RETRY_AFTER_S)


def _failed(number: int, error: LongshoreError) -> Failed:
    return Failed(number, error.code, error.message, error.param, error.retry_after_s)
