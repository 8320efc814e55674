"""The data path behind the HTTP and WebSocket faces: cache, then a core, then the student, then what is left.

`open` gives an answer whose first bytes are there; whatever fails before is tried elsewhere as far as `retry`
permits, whatever fails after is a typed error. Owns the order of the ladder, no sockets of clients.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from longshore.errors import (
    DeadlineExceededError,
    LongshoreError,
    NoTierAvailableError,
    UnavailableError,
    UnknownModelError,
    UnsupportedParameterError,
)
from longshore_edge import retry, stored
from longshore_edge.answers import Answer, CoreStream, StreamAnswer, WholeAnswer, complete_whole
from longshore_edge.cache import AnswerCache, Entry, KeyMemo, SingleFlight, is_deterministic
from longshore_edge.call import Call, hop
from longshore_edge.config import EdgeConfig
from longshore_edge.cores import Core, Fleet, Lease
from longshore_edge.health import RetryBudget
from longshore_edge.metrics import Metrics
from longshore_edge.recording import RecordedStream, ReplayedStream
from longshore_edge.student import EdgeStudent
from longshore_edge.upstream import Upstream

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Relay:
    """What all requests of one worker share. `clock` is monotonic, in seconds."""

    config: EdgeConfig
    fleet: Fleet
    upstream: Upstream
    cache: AnswerCache | None
    flights: SingleFlight
    student: EdgeStudent | None
    budget: RetryBudget
    metrics: Metrics
    clock: Callable[[], float]
    keys: KeyMemo = field(default_factory=KeyMemo)

    def open_from_memory(self, call: Call) -> Answer | None:
        """The cached answer if it is at hand; never waits."""
        call.cache_key = self._cache_key(call)
        if call.cache_key is None or self.cache is None:
            return None
        entry = self.cache.get_from_memory(call.cache_key)
        return None if entry is None else self._replay(call, entry, "exact cache")

    async def open(self, call: Call) -> Answer:
        """The answer to `call`, begun, after `open_from_memory` gave none; a stream must be closed.

        Raises LongshoreError.
        """
        key = call.cache_key
        if key is None or self.cache is None:
            answer = await self._climb(call)
            return self._kept_for_last_resort(call, answer)
        await self.flights.enter(key)
        hand_over = False
        try:
            entry = await self.cache.get(key) or await self._from_stored_stream(call)
            if entry is not None:
                return self._replay(call, entry, "exact cache")
            self.metrics.count("longshore:edge_cache_total", "miss")
            answer = await self._climb(call)
            if isinstance(answer, WholeAnswer):
                self._store_whole(call, key, answer)
            else:
                hand_over = True
                return self._recorded(answer, call, key, lambda: self.flights.leave(key))
            return answer
        finally:
            if not hand_over:
                self.flights.leave(key)

    # -- cache ---------------------------------------------------------------------------------

    def _cache_key(self, call: Call) -> bytes | None:
        """The key where the cache may answer: the weights are known and the request decides the answer."""
        if self.cache is None:
            return None
        digest = self.fleet.digest_of(call.request.model)
        if digest is None or not (is_deterministic(call.request) or self.config.cache_sampled == "always"):
            return None
        return self.keys.key_of(call.client.tenant, digest, call.request)

    def _last_resort_key(self, call: Call) -> bytes | None:
        digest = self.fleet.digest_of(call.request.model)
        if self.cache is None or digest is None:
            return None
        if not is_deterministic(call.request) and self.config.cache_sampled == "never":
            return None
        return self.keys.key_of(call.client.tenant, digest, call.request)

    def _replay(self, call: Call, entry: Entry, what: str) -> Answer:
        self.metrics.count("longshore:edge_cache_total", "hit")
        node, age_s = self.config.node, max(0.0, time.time() - entry.stored_s)
        now_s = self.clock()
        body = stored.replay(
            entry.body, call, node, f"{what}: answered {age_s:.0f} s ago", hop(call, node, now_s, now_s)
        )
        if call.request.stream:
            return ReplayedStream(body)
        return WholeAnswer(body, is_cacheable=False)

    def _kept_for_last_resort(self, call: Call, answer: Answer) -> Answer:
        """The answer to a request that the cache answers at the very last, stored if the settings say so."""
        key = self._last_resort_key(call)
        if key is None:
            return answer
        if not isinstance(answer, WholeAnswer):
            return self._recorded(answer, call, key, None)
        self._store_whole(call, key, answer)
        return answer

    async def _from_stored_stream(self, call: Call) -> Entry | None:
        """A whole answer made of the stream that the same request got before."""
        assert self.cache is not None
        twin = _streamed_twin(call)
        key = None if twin is None else self._cache_key(twin)
        entry = None if key is None else await self.cache.get(key)
        if entry is None:
            return None
        body = stored.whole_of_stream(entry.body, call.request, call.num_choices)
        return None if body is None else Entry(body, entry.stored_s)

    def _store_whole(self, call: Call, key: bytes, answer: WholeAnswer) -> None:
        assert self.cache is not None
        is_the_model = answer.model_digest == self.fleet.digest_of(call.request.model)
        if not answer.is_cacheable or not is_the_model:
            return
        body = stored.store_whole(answer.body)
        if body is not None and len(body) <= self.config.cache_max_entry_bytes:
            self.cache.put(key, body)

    def _recorded(
        self, answer: StreamAnswer, call: Call, key: bytes, on_close: Callable[[], None] | None
    ) -> RecordedStream:
        max_bytes = self.config.cache_max_entry_bytes
        return RecordedStream(
            answer, lambda blocks: self._store_stream(call, key, blocks), max_bytes, on_close
        )

    def _store_stream(self, call: Call, key: bytes, blocks: list[bytes]) -> None:
        assert self.cache is not None
        made = stored.store_stream(blocks, call)
        if made is not None and made[1] == self.fleet.digest_of(call.request.model):
            self.cache.put(key, made[0])

    # -- the ladder ----------------------------------------------------------------------------

    async def _climb(self, call: Call) -> Answer:
        model = call.request.model
        student = self.student
        if student is not None and model == student.name and self.fleet.digest_of(model) is None:
            return await self._from_student(call, f"{model} is the edge's own model", is_degraded=False)
        if self.fleet.model_is_unknown(model):
            raise UnknownModelError(f"no model {model[:100]!r} here", param="model")
        if call.first_image is not None and self.fleet.model_is_unknown(model, for_images=True):
            return await self._from_seeing_student(call, call.first_image)
        answer = await self._from_quicker_student(call)
        if answer is not None:
            return answer
        try:
            return await self._from_cores(call)
        except LongshoreError as error:
            if not retry.may_fall_back(error):
                raise
            return await self._last_resorts(call, error)

    async def _from_seeing_student(self, call: Call, image: str) -> Answer:
        """The student's answer to a request whose pictures no core takes; a typed refusal if it can't."""
        answer = await self._try_student(call, f"no core takes pictures for {call.request.model[:100]}")
        if answer is None:
            raise UnsupportedParameterError(f"{image}: this model takes no images", param=image)
        return answer

    async def _from_quicker_student(self, call: Call) -> Answer | None:
        """The student's answer where the cores are predicted to miss the target and it is quicker."""
        target_ms = call.request.longshore.ttft_target_ms or self.config.ttft_target_ms
        for_images = call.first_image is not None
        best = self.fleet.predicted_ttft_s(call.request.model, call.place, for_images=for_images)
        if target_ms is None or best is None or best[1] * 1e3 <= target_ms:
            return None
        core, predicted_s = best
        own_s = self._student_ttft_s(call)
        if own_s is None or own_s >= predicted_s:
            return None
        why = (
            f"{core.name} predicted {predicted_s * 1e3:.0f} ms > target {target_ms} ms;"
            f" student {own_s * 1e3:.0f} ms"
        )
        call.note("core", "skipped", why, node=core.name)
        return await self._try_student(call, why)

    def _student_ttft_s(self, call: Call) -> float | None:
        student = self.student
        if student is None or not student.may_answer_for(call.request.model):
            return None
        return student.predicted_ttft_s(call.request)

    async def _try_student(self, call: Call, reason: str) -> Answer | None:
        """The student's answer, or None where it can't give one; the attempt is noted either way."""
        student = self.student
        if student is None or not student.may_answer_for(call.request.model):
            return None
        is_degraded = student.model_digest != self.fleet.digest_of(call.request.model)
        try:
            return await self._from_student(call, reason, is_degraded=is_degraded)
        except DeadlineExceededError:
            raise
        except LongshoreError as error:
            call.note("edge", "failed", f"student: {error.message}", node=self.config.node)
            return None

    async def _from_student(self, call: Call, reason: str, *, is_degraded: bool) -> Answer:
        assert self.student is not None
        answer = await self.student.answer(call, reason, is_degraded=is_degraded)
        self._note_source(call, "student")
        return answer

    async def _last_resorts(self, call: Call, error: LongshoreError) -> Answer:
        """The student, then an old answer to the same request, then the typed end."""
        answer = await self._try_student(call, f"no core answered: {error.message}")
        if answer is not None:
            return answer
        key = self._last_resort_key(call)
        entry = await self.cache.get(key, stale=True) if self.cache is not None and key is not None else None
        if entry is not None:
            return self._replay(call, entry, "cores failed, stale cache")
        tried = "; ".join(f"{item.node or item.tier}: {item.reason}" for item in call.attempts[-4:])
        raise NoTierAvailableError(
            f"no tier could answer: {tried or error.message}",
            retry_after_s=error.retry_after_s or _RETRY_AFTER_S,
            request_id=call.request_id,
        )

    # -- cores ---------------------------------------------------------------------------------

    async def _from_cores(self, call: Call) -> Answer:
        """The first core that answers; raises the last failure."""
        self._note_ailing(call)
        tried: set[str] = set()
        num_lost = 0
        error: LongshoreError | None = None
        for_images = call.first_image is not None
        for _ in range(self.config.max_tries):
            choice = self.fleet.choose(
                call.request.model, call.place, frozenset(tried), for_images=for_images
            )
            if choice is None or (tried and not self.budget.withdraw()):
                break
            if not tried:
                self.budget.deposit()
            core, reason = choice
            try:
                return await self._attempt(call, core, reason)
            except LongshoreError as failure:
                error = failure
                if not retry.may_retry(failure, num_lost):
                    break
                num_lost += retry.is_lost(failure)
                tried.add(core.name)
        raise error or self._none_is_well()

    async def _attempt(self, call: Call, core: Core, reason: str) -> Answer:
        """One attempt at one core; notes what came of it and keeps the core's state right."""
        lease = Lease(core, self.clock)
        try:
            answer = await self._ask(call, lease, reason)
        except LongshoreError as error:
            if retry.is_cores_fault(error):
                lease.fail()
            else:
                lease.succeed()
            self.metrics.count("longshore:edge_attempts_total", core.name, "failed")
            elapsed_s = self.clock() - lease.sent_s
            call.note("core", "failed", f"{error.code}: {error.message}", node=core.name, elapsed_s=elapsed_s)
            raise
        except BaseException:
            lease.abandon()
            raise
        self.metrics.count("longshore:edge_attempts_total", core.name, "served")
        self._note_source(call, "core")
        return answer

    async def _ask(self, call: Call, lease: Lease, reason: str) -> Answer:
        def note_served() -> None:
            elapsed_s = self.clock() - lease.sent_s
            call.note("core", "served", reason, node=lease.core.name, elapsed_s=elapsed_s)

        response = await self.upstream.send(lease.core, call)
        if not call.request.stream:
            try:
                body = await self.upstream.read_whole(lease.core, response)
            except BaseException:
                response.close()
                raise
            response.release()
            max_bytes = self.config.max_answer_bytes
            answer = complete_whole(body, call, lease, self.config.node, max_bytes, note_served)
            lease.succeed()
            return answer
        stream = CoreStream(call, lease, response, self.upstream, self.config.node, self.clock)
        try:
            await stream.prime(note_served)
        except BaseException:
            response.close()
            raise
        return stream

    def _note_ailing(self, call: Call) -> None:
        for core in self.fleet.cores.values():
            if not core.is_well():
                call.note("core", "skipped", core.ailment(), node=core.name)

    def _note_source(self, call: Call, source: str) -> None:
        self.metrics.count("longshore:edge_answers_total", source)
        self.metrics.observe("longshore:edge_ttft_seconds", self.clock() - call.arrived_s, source)

    def _none_is_well(self) -> UnavailableError:
        ailments = "; ".join(f"{core.name}: {core.ailment()}" for core in self.fleet.cores.values())
        return UnavailableError(ailments or "there is no core", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        waits = [core.breaker.retry_in_s() for core in self.fleet.cores.values()]
        return max(_RETRY_AFTER_S, min(waits, default=_RETRY_AFTER_S))


def _streamed_twin(call: Call) -> Call | None:
    """The same request as a stream; None if it is one."""
    if call.request.stream:
        return None
    return dataclasses.replace(call, request=dataclasses.replace(call.request, stream=True))
