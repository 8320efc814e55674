"""A planned request's way inside one HTTP worker: admitted, generated, told as events.

Every answer is an `AnswerStream`: a task that drives the engine and a bounded buffer that the sender empties.
Closing the stream ends the engine's work. It never touches a socket and never picks a model's weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import cast

from longshore.errors import (
    CancelledError,
    DeadlineExceededError,
    DuplicateRequestError,
    EngineFailedError,
    InternalError,
    LongshoreError,
    UnavailableError,
)
from longshore.wire import AnswerEvent, AnyRequest, Hop, Report, Segment, Usage, usage_of
from longshore_server.admission import Admission
from longshore_server.auth import Caller
from longshore_server.choice import Choice
from longshore_server.config import CoreConfig
from longshore_server.engines.base import Engine, EngineToken, GenerateJob
from longshore_server.event_buffer import EventBuffer
from longshore_server.images import ImageReader
from longshore_server.peer_counts import PeerCounts
from longshore_server.planning import Plan, Planner
from longshore_server.telemetry import shared
from longshore_server.telemetry.metrics import Metrics
from longshore_server.text import ModelText

logger = logging.getLogger(__name__)

_MAX_BUFFERED_EVENTS = 256
_DEADLINE_GRACE_S = 0.25  # the engine is asked to end it first, and says how far it came
_CLOSE_TIMEOUT_S = 5.0
_DRAIN_POLL_S = 0.02


class AnswerService:
    """Plans requests and opens their answers on one engine."""

    def __init__(
        self,
        config: CoreConfig,
        engine: Engine,
        text: ModelText,
        metrics: Metrics,
        *,
        reader: ImageReader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.engine = engine
        self.text = text
        reader = reader if "images" in engine.capabilities else None
        self._planner = Planner(config, engine, text, reader)
        self.takes_images = reader is not None
        self.metrics = metrics
        self.clock = clock
        # Twice what the engine runs at once keeps its batch full; those that wait in it go by lane, too.
        # Half of its places stay free for jobs that have ended here and of which it has not heard yet.
        places = (config.max_num_seqs + config.max_waiting) // config.workers
        max_running = min(2 * config.max_num_seqs, max(config.max_num_seqs // config.workers, places // 2))
        self.admission = Admission(
            max_running=max(max_running, 1),
            max_waiting=-(-config.max_waiting // config.workers),
            max_per_tenant=config.max_in_flight_per_tenant,
            peers=PeerCounts(folder)
            if (folder := shared.folder_of_workers()) and config.workers > 1
            else None,
            on_waiting=metrics.admission_waiting,
            clock=clock,
        )
        self._in_flight: dict[tuple[str, str, int], AnswerStream] = {}
        self._is_draining = False

    async def plan(self, request: AnyRequest, caller: Caller, request_id: str, arrived_s: float) -> Plan:
        """Check a request and put it into tokens; raises a RequestError, or DeadlineExceededError.

        Pictures may wait for others' to be decoded, so the request's own time bounds this, too.
        """
        remaining_s = arrived_s + self._planner.time_s(request) - self.clock()
        try:
            async with asyncio.timeout(max(remaining_s, 0) + _DEADLINE_GRACE_S):
                return await self._planner.plan(request, caller, request_id, arrived_s)
        except TimeoutError:
            raise DeadlineExceededError("the request's time was over before it could be read") from None

    def open(self, plan: Plan) -> AnswerStream:
        """Start the answer; the caller must `aclose` the stream.

        Raises DuplicateRequestError, and UnavailableError once the draining has begun.
        """
        if self._is_draining:
            raise _shutting_down(self.config.drain_timeout_s)
        if plan.key in self._in_flight:
            raise DuplicateRequestError("a request with this id is in flight", param="longshore.request_id")
        stream = AnswerStream(self, plan, on_end=lambda: self._in_flight.pop(plan.key, None))
        self._in_flight[plan.key] = stream
        return stream

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let answers finish for `timeout_s`, then end the rest with UnavailableError."""
        self._is_draining = True
        end_s = self.clock() + timeout_s
        while self._in_flight and self.clock() < end_s:
            await asyncio.sleep(_DRAIN_POLL_S)
        for stream in tuple(self._in_flight.values()):
            stream.cancel(_shutting_down(self.config.drain_timeout_s))


class AnswerStream:
    """One answer under way. `take` until `is_over`; `aclose` in any case, which aborts what still runs."""

    def __init__(self, service: AnswerService, plan: Plan, *, on_end: Callable[[], object]) -> None:
        self.plan = plan
        self._service = service
        self._buffer: EventBuffer[AnswerEvent] = EventBuffer(_MAX_BUFFERED_EVENTS)
        self._choices = [self._choice(index) for index in range(len(plan.jobs))]
        self._num_open = len(self._choices)
        self._begun_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = [plan.arrived_s] * len(plan.jobs)
        self._num_new_tokens = 0
        self._num_cached_tokens = 0
        self._was_resumed = False
        self._task = asyncio.create_task(self._run(), name=f"answer-{plan.request_id}")
        self._task.add_done_callback(lambda _: on_end())  # also for a task that was never begun

    @property
    def is_over(self) -> bool:
        """True once the answer's true end was taken."""
        return self._buffer.is_over

    @property
    def num_tokens(self) -> int:
        """New tokens so far, over all choices."""
        return self._num_new_tokens

    async def take(self, timeout_s: float | None = None) -> list[AnswerEvent]:
        """The events that are ready, waiting for the first; none after `timeout_s`.

        Raises the LongshoreError that ended the answer, after the events before it.
        """
        return await self._buffer.take(timeout_s)

    def cancel(self, error: LongshoreError | None = None) -> None:
        """End the answer at once; what was not taken is dropped and `take` raises `error`.

        Without an `error` it was the client that left.
        """
        if error is None and not self._task.done():
            self._service.metrics.cancelled.inc()
        self._buffer.close(self._told(error or CancelledError("the client left")), discard=True)
        self._task.cancel()

    async def aclose(self) -> None:
        """End whatever still runs and wait until the engine was told."""
        self._buffer.close(CancelledError("the answer was closed"), discard=True)
        self._task.cancel()
        await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)

    # -- the task ------------------------------------------------------------------------------

    async def _run(self) -> None:
        error: LongshoreError | None = None
        try:
            await self._answer_in_time()
        except LongshoreError as caught:
            error = caught
        except asyncio.CancelledError:
            error = CancelledError("the answer was cancelled")
        except Exception:
            logger.exception("request %s failed", self.plan.request_id)
            error = InternalError("the answer failed inside the server")
        finally:
            self._buffer.close(None if error is None else self._told(error))

    def _told(self, error: LongshoreError) -> LongshoreError:
        error.request_id = self.plan.request_id
        error.tokens_delivered = self._num_new_tokens or None
        return error

    async def _answer_in_time(self) -> None:
        plan, now_s = self.plan, self._service.clock()
        try:
            async with asyncio.timeout(max(plan.deadline_s - now_s, 0) + _DEADLINE_GRACE_S):
                await self._answer()
        except TimeoutError:
            raise DeadlineExceededError(
                f"the request's {plan.deadline_s - plan.arrived_s:.3f} s are over"
            ) from None

    async def _answer(self) -> None:
        plan = self.plan
        async with self._service.admission.slots(
            tenant=plan.caller.tenant, lane=plan.request.lane, num_slots=len(plan.jobs)
        ):
            self._begun_s = self._service.clock()
            self._service.metrics.queue_s.observe(self._begun_s - plan.arrived_s)
            if len(plan.jobs) == 1:
                await self._drive(self._choices[0], plan.jobs[0])
            else:
                await self._drive_all()
        self._observe_end()

    async def _drive_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for choice, job in zip(self._choices, self.plan.jobs, strict=True):
                    group.create_task(self._drive(choice, job))
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from None

    async def _drive(self, choice: Choice, job: GenerateJob) -> None:
        if job.params.max_tokens == 0:
            choice.finish_reason = "length"  # other models gave all the tokens that were asked for
        if choice.finish_reason is None:
            tokens = cast(AsyncGenerator[EngineToken, None], self._service.engine.generate(job))
            async with aclosing(tokens):
                async for token in tokens:
                    event = choice.take(token)
                    self._note(choice.index, token)
                    if event is not None:
                        await self._buffer.put(event)
                    if choice.finish_reason is not None:
                        break
        if choice.finish_reason is None:
            raise EngineFailedError("the engine stopped without an end of the answer")
        await self._finish(choice)

    async def _finish(self, choice: Choice) -> None:
        assert choice.finish_reason is not None
        self._num_open -= 1
        self._service.metrics.success(choice.finish_reason)
        is_last = self._num_open == 0
        event = choice.finish(self._usage(), self._report()) if is_last else choice.finish()
        await self._buffer.put(event)

    # -- what is told of it --------------------------------------------------------------------

    def _choice(self, index: int) -> Choice:
        plan = self.plan
        return Choice(
            index,
            self._service.text,
            model_digest=self._service.engine.info.digest,
            stop_strings=plan.request.stop_strings,
            num_logprobs=plan.request.num_logprobs,
            seam=plan.seam,
        )

    def _note(self, index: int, token: EngineToken) -> None:
        now_s, metrics = self._service.clock(), self._service.metrics
        self._num_cached_tokens = max(self._num_cached_tokens, token.num_cached_tokens)
        self._was_resumed = self._was_resumed or token.was_resumed
        if token.token_id is None:
            return
        self._num_new_tokens += 1
        metrics.generation_tokens.inc()
        if self._first_token_s is None:
            self._first_token_s = now_s
            metrics.ttft_s.observe(now_s - self.plan.arrived_s)
        elif self._last_token_s[index] > self.plan.arrived_s:
            metrics.inter_token_s.observe(now_s - self._last_token_s[index])
        self._last_token_s[index] = now_s

    def _observe_end(self) -> None:
        plan, metrics, now_s = self.plan, self._service.metrics, self._service.clock()
        metrics.e2e_s.observe(now_s - plan.arrived_s)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        num_later_tokens = self._num_new_tokens - len(plan.jobs)
        if self._first_token_s is not None and num_later_tokens > 0:
            per_choice = num_later_tokens / len(plan.jobs)
            metrics.time_per_token_s.observe((now_s - self._first_token_s) / per_choice)

    @property
    def _num_prompt_tokens(self) -> int:
        """Tokens of every prompt once, however many choices it has, as OpenAI counts them."""
        prompts = self.plan.jobs[:: self.plan.request.n]
        return sum(len(job.prompt_token_ids) for job in prompts)

    def _usage(self) -> Usage:
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        cached = min(self._num_cached_tokens, self._num_prompt_tokens)
        return usage_of(self._num_prompt_tokens, num_completion_tokens, cached)

    def _report(self) -> Report:
        plan, service = self.plan, self._service
        node, digest = service.config.node, service.engine.info.digest
        is_resumed = plan.request.longshore.continue_from is not None
        first_offset = plan.seam.offset + len(plan.seam.token_ids)
        segment = Segment(plan.seam.segment, "core", node, digest, first_offset)
        return Report(
            request_id=plan.request_id,
            served_by="core",
            node=node,
            model_digest=digest,
            resumed=is_resumed or self._was_resumed,
            hops=(self._hop(node),),
            segments=(segment,) if is_resumed else (),
            images=plan.images,
        )

    def _hop(self, node: str) -> Hop:
        return Hop(
            "core",
            node,
            queue_ms=self._ms_until(self._begun_s),
            ttft_ms=self._ms_until(self._first_token_s),
            total_ms=self._ms_until(self._service.clock()),
        )

    def _ms_until(self, time_s: float | None) -> float | None:
        return None if time_s is None else round((time_s - self.plan.arrived_s) * 1000, 3)


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a group that is told: ours before others, since the others follow from it."""
    flat = list(_flatten(errors))
    return next((error for error in flat if isinstance(error, LongshoreError)), flat[0])


def _flatten(errors: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in errors.exceptions:
        found += _flatten(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _shutting_down(retry_after_s: float) -> UnavailableError:
    return UnavailableError("this core is shutting down", retry_after_s=retry_after_s)
