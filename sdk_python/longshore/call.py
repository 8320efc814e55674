"""One request's way through the tiers, free of I/O: what to try next, what an event or a failure means.

The clients drive it with the time; it opens nothing and never sleeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

from longshore.config import Mode, RoutingSettings
from longshore.errors import (
    AnswerInterruptedError,
    BundleError,
    CancelledError,
    ConfigError,
    DeadlineExceededError,
    DeviceError,
    LongshoreError,
    NoTierAvailableError,
    OverloadedError,
    PromptTooLongError,
    ProtocolError,
    RequestError,
    TierError,
    UnsupportedParameterError,
)
from longshore.measure import RetryBudget, Ticket, TierMeter
from longshore.policy import (
    Candidate,
    Plan,
    RequestFacts,
    Skipped,
    TierView,
    backoff_s,
    count_images,
    first_token_budget_ms,
    passed_over,
    plan,
)
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    Attempt,
    CompletionRequest,
    Continuation,
    FinishEvent,
    Hop,
    Report,
    TokenEvent,
    TokenMark,
    limits,
    with_extension,
)
from longshore.wire.event import Outcome
from longshore.wire.render import AnswerCollector

SDK_NODE = "sdk"
_UNKNOWN_DIGEST = "0" * 16
_MAX_REASON_CHARS = 500
# Errors that another tier may not have: the tier's own, or "not here, not now".
_MOVES_ON = (TierError, OverloadedError, DeviceError, BundleError, ConfigError)


@dataclass(frozen=True, slots=True)
class Try:
    """Send the request to this tier; both times are of the monotonic clock that the call is told."""

    candidate: Candidate
    request: AnyRequest
    first_token_by_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Every tier is busy or failing; go on after this long."""

    seconds: float


class Progress:
    """What of an answer has arrived: enough to tell the caller, and to go on elsewhere."""

    def __init__(self, num_choices: int) -> None:
        self.collector = AnswerCollector(num_choices)
        self._num_tokens = [0] * num_choices
        self._last_mark: TokenMark | None = None

    def add(self, event: AnswerEvent) -> None:
        """Take the next event; raises ProtocolError on a gap, a repeat or an event after the end."""
        self.collector.add(event)
        if not isinstance(event, TokenEvent):
            return
        expected = self._num_tokens[event.index]
        if event.mark.offset != expected:
            raise ProtocolError(f"token {event.mark.offset} came where {expected} was next")
        self._num_tokens[event.index] = expected + 1
        self._last_mark = event.mark

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return self.collector.num_tokens

    @property
    def model_digest(self) -> str:
        """The weights that the last token came from."""
        return self._last_mark.model_digest if self._last_mark else _UNKNOWN_DIGEST

    @property
    def resume_offset(self) -> int:
        """The offset of the next token of the first choice."""
        return self._num_tokens[0]

    def continuation(self) -> Continuation:
        """Where the first choice goes on, for a tier that takes over."""
        segment = self._last_mark.segment + 1 if self._last_mark else 0
        digest = self._last_mark.model_digest if self._last_mark else None
        return Continuation(self.collector.token_ids(), self.collector.text(), segment, digest)


def num_choices(request: AnyRequest) -> int:
    """How many answers the request asks for, over all its prompts."""
    return request.n * len(request.prompts) if isinstance(request, CompletionRequest) else request.n


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What a call is held to. `delivers_tokens` is True where the caller sees tokens as they come:
    such an answer is never begun anew."""

    mode: Mode
    started_s: float
    deadline_s: float
    ttft_target_ms: float
    delivers_tokens: bool
    routing: RoutingSettings


class Call:
    """The state machine of one request.

    `meters` are the tiers by node; `views` gives what is known of them at a moment, and
    `count_prompt_tokens` a prompt's length. `random_unit` gives numbers in [0, 1).
    """

    def __init__(
        self,
        request: AnyRequest,
        settings: CallSettings,
        *,
        meters: dict[str, TierMeter],
        views: Callable[[float], Sequence[TierView]],
        num_prompt_tokens: int,
        budget: RetryBudget,
        random_unit: Callable[[], float],
    ) -> None:
        self.request = request
        self.settings = settings
        self.report: Report | None = None
        self.progress = Progress(num_choices(request))
        self._meters = meters
        self._views = views
        self._num_prompt_tokens = num_prompt_tokens
        self._budget = budget
        self._random_unit = random_unit
        self._plan = Plan((), ())
        self._queue: list[Candidate] = []
        self._num_rounds = 0
        self._needs_plan = True
        self._hints_s: list[float] = []
        self._attempts: list[Attempt] = []
        self._round_errors: list[LongshoreError] = []
        self._failures: list[tuple[Candidate, LongshoreError]] = []
        self._current: Candidate | None = None
        self._ticket: Ticket | None = None
        self._first_token_s: float | None = None
        budget.deposit()

    # -- what next -----------------------------------------------------------------------------

    def next_step(self, now_s: float) -> Try | Wait:
        """The next tier to try, or a pause; raises the final error when nothing is left."""
        if now_s >= self.settings.deadline_s:
            self._raise_late()
        if self._needs_plan:
            self._begin_round(now_s)
        while self._queue:
            candidate = self._queue.pop(0)
            ticket = self._meters[candidate.node].begin(now_s, candidate.basis_ms)
            if ticket is not None:
                return self._try(candidate, ticket, now_s)
            self._attempts.append(_attempt(candidate, "skipped", "another request is probing it just now"))
        return self._pause(now_s)

    def _begin_round(self, now_s: float) -> None:
        self._num_rounds += 1
        self._needs_plan = False
        self._round_errors = []
        self._plan = self._make_plan(now_s)
        self._queue = list(self._plan.candidates)

    def _make_plan(self, now_s: float) -> Plan:
        return plan(self._views(now_s), self._facts(now_s), self.settings.mode, self.settings.routing)

    def _facts(self, now_s: float) -> RequestFacts:
        lengths = [meter.answer_tokens for meter in self._meters.values() if meter.answer_tokens is not None]
        prior = self.settings.routing.prior_answer_tokens
        return RequestFacts(
            num_prompt_tokens=self._num_prompt_tokens,
            max_tokens=self.request.token_limit,
            remaining_ms=(self.settings.deadline_s - now_s) * 1000,
            ttft_target_ms=self.settings.ttft_target_ms,
            device_only=self.request.longshore.privacy == "device-only",
            num_images=count_images(self.request),
            answer_tokens=sum(lengths) / len(lengths) if lengths else prior,
        )

    def _try(self, candidate: Candidate, ticket: Ticket, now_s: float) -> Try:
        self._current, self._ticket, self._first_token_s = candidate, ticket, None
        self.progress = Progress(num_choices(self.request))
        remaining_ms = (self.settings.deadline_s - now_s) * 1000
        budget_ms = first_token_budget_ms(remaining_ms, self._queue)
        request = with_extension(
            self.request,
            deadline_ms=min(max(1, int(remaining_ms)), limits.MAX_DEADLINE_MS),
            ttft_target_ms=max(1, int(self.settings.ttft_target_ms)),
        )
        return Try(candidate, request, now_s + budget_ms / 1000, self.settings.deadline_s)

    def _pause(self, now_s: float) -> Wait:
        """The round is over: wait for the next one, if it can help and there is time and budget."""
        self._hints_s = self._retry_hints(now_s)
        if not self._hints_s or self._num_rounds >= self.settings.routing.max_rounds:
            self._raise_final()
        wait_s = backoff_s(
            self._num_rounds - 1, self._random_unit(), self.settings.routing, min(self._hints_s)
        )
        if now_s + wait_s >= self.settings.deadline_s or not self._budget.withdraw():
            self._raise_final()
        self._needs_plan = True
        return Wait(wait_s)

    def _retry_hints(self, now_s: float) -> list[float]:
        """How soon each tier might answer, in seconds from now; empty where asking again is no use."""
        was_transient = any(error.retryable for error in self._round_errors)
        if not was_transient and all(item.retry_in_ms is None for item in self._plan.skipped):
            return []
        fresh = self._make_plan(now_s)
        hints_s = [item.retry_in_ms / 1000 for item in fresh.skipped if item.retry_in_ms is not None]
        return [*hints_s, 0.0] if fresh.candidates else hints_s

    # -- what happened -------------------------------------------------------------------------

    def take(self, event: AnswerEvent, now_s: float) -> AnswerEvent:
        """The event as the caller sees it: the last one carries our report."""
        self.progress.add(event)
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._meter().first_token(self._open_ticket(), now_s)
        if isinstance(event, FinishEvent) and self.progress.collector.is_finished:
            return self._finish(event, now_s)
        return event

    def end(self) -> None:
        """The tier's stream is over; raises AnswerInterruptedError if the answer is not whole."""
        if not self.progress.collector.is_finished:
            raise AnswerInterruptedError(f"the answer stopped after {self.progress.num_tokens} tokens")

    def fail(self, error: LongshoreError, now_s: float) -> None:
        """The attempt failed: raises where that is the caller's to know, returns where more is tried."""
        candidate, ticket = self._current, self._ticket
        if candidate is None or ticket is None:
            raise error
        self._ticket = None
        self._meters[candidate.node].fail(ticket, now_s, error)
        has_begun = self.progress.num_tokens > 0
        words = f"{error.code}: {error.message}"
        elapsed_ms = (now_s - ticket.started_s) * 1000
        outcome: Outcome = "interrupted" if has_begun else "failed"
        self._attempts.append(_attempt(candidate, outcome, words, elapsed_ms))
        self._failures.append((candidate, error))
        self._round_errors.append(error)
        if has_begun and self.settings.delivers_tokens:
            self._raise_interrupted(error)
        if not _moves_on(error, candidate, count_images(self.request)):
            raise self._told(error)
        if now_s >= self.settings.deadline_s:
            self._raise_late()

    def leave(self, now_s: float) -> None:
        """The caller is gone, or the answer whole; ends what is still open. Safe to call twice."""
        if self._ticket is not None:
            self._meter().leave(self._ticket, now_s)
            self._ticket = None

    # -- the report ----------------------------------------------------------------------------

    def _finish(self, event: FinishEvent, now_s: float) -> FinishEvent:
        ticket = self._open_ticket()
        inner = event.report or self.progress.collector.report
        self.report = self._make_report(inner, ticket, now_s)
        from_cache = inner is not None and inner.cached
        self._meter().finish(ticket, now_s, self.progress.num_tokens, from_cache=from_cache)
        self._ticket = None
        usage = event.usage or self.progress.collector.usage
        return dataclasses.replace(event, usage=usage, report=self.report)

    def _make_report(self, inner: Report | None, ticket: Ticket, now_s: float) -> Report:
        candidate = cast(Candidate, self._current)
        elapsed_ms = (now_s - ticket.started_s) * 1000
        served = _attempt(candidate, "served", candidate.reason, elapsed_ms)
        base = inner or Report(
            self.request.longshore.request_id or "",
            candidate.tier,
            candidate.node,
            self.progress.model_digest,
        )
        attempts = (*self._considered(candidate), served, *base.attempts)
        hop = Hop(
            "device",
            SDK_NODE,
            queue_ms=(ticket.started_s - self.settings.started_s) * 1000,
            ttft_ms=((self._first_token_s or now_s) - self.settings.started_s) * 1000,
            total_ms=(now_s - self.settings.started_s) * 1000,
        )
        return dataclasses.replace(
            base,
            reason="; ".join(part for part in (self._why(candidate), base.reason) if part),
            attempts=attempts[: limits.MAX_ATTEMPTS],
            hops=(hop, *base.hops)[: limits.MAX_HOPS],
        )

    def _why(self, candidate: Candidate) -> str:
        failed = [f"{other.tier} failed ({error.code})" for other, error in self._failures]
        return "; ".join([*failed, candidate.reason])

    def _considered(self, served: Candidate) -> list[Attempt]:
        """The tiers before the one that served: ruled out, tried in vain, or better but too slow."""
        begin = self._plan.candidates.index(served)
        slower = passed_over(self._plan.candidates[begin:])
        return [
            *(_skip(item) for item in self._plan.skipped),
            *(_attempt(item, "skipped", item.note) for item in slower),
            *self._attempts,
        ]

    # -- the errors ----------------------------------------------------------------------------

    def _told(self, error: LongshoreError) -> LongshoreError:
        error.attempts = (*(_skip(item) for item in self._plan.skipped), *self._attempts)
        error.request_id = error.request_id or self.request.longshore.request_id
        return error

    def _raise_interrupted(self, cause: LongshoreError) -> NoReturn:
        """The caller has read part of the answer, so it is not begun anew; say how far it came."""
        error = cause
        if isinstance(cause, TierError | DeviceError) and not isinstance(
            cause, AnswerInterruptedError | DeadlineExceededError
        ):
            error = AnswerInterruptedError(f"the answer was cut off: {cause.message}")
        error.tokens_delivered = self.progress.num_tokens
        error.partial_text = self.progress.collector.text()
        raise self._told(error) from (cause if cause is not error else None)

    def _raise_late(self) -> NoReturn:
        total_ms = (self.settings.deadline_s - self.settings.started_s) * 1000
        tried = "; ".join(f"{item.tier} failed ({error.code})" for item, error in self._failures)
        words = f"no answer within {total_ms:.0f} ms" + (f": {tried}" if tried else "")
        raise self._told(DeadlineExceededError(words)) from self._last_error()

    def _raise_final(self) -> NoReturn:
        """One tier tried: its own error. Several or none: NoTierAvailableError naming each."""
        if len({candidate.node for candidate, _ in self._failures}) == 1:
            raise self._told(self._failures[-1][1])
        too_long = [item for item in self._plan.skipped if item.prompt_too_long]
        if not self._failures and too_long:
            raise self._told(PromptTooLongError(f"{too_long[0].tier}: {too_long[0].reason}"))
        words = [f"{candidate.tier} failed ({error.code})" for candidate, error in self._failures]
        words += [f"{item.tier} skipped ({item.reason})" for item in self._plan.skipped]
        error = NoTierAvailableError(
            "no tier answered: " + "; ".join(words), retry_after_s=min(self._hints_s, default=None)
        )
        raise self._told(error) from self._last_error()

    def _last_error(self) -> LongshoreError | None:
        return self._failures[-1][1] if self._failures else None

    def _meter(self) -> TierMeter:
        return self._meters[cast(Candidate, self._current).node]

    def _open_ticket(self) -> Ticket:
        if self._ticket is None:
            raise ProtocolError("an event came after the end of the answer")
        return self._ticket


def _moves_on(error: LongshoreError, candidate: Candidate, num_images: int) -> bool:
    """True if another tier may do better: never for a bad request, unless only the device refused it, or the
    tier may have refused no more than pictures, which another model may take."""
    if isinstance(error, CancelledError):
        return False
    if isinstance(error, UnsupportedParameterError) and num_images:
        return True
    if isinstance(error, RequestError):
        return candidate.tier == "device"
    return isinstance(error, _MOVES_ON)


def _attempt(candidate: Candidate, outcome: Outcome, reason: str, elapsed_ms: float | None = None) -> Attempt:
    return Attempt(candidate.tier, outcome, reason[:_MAX_REASON_CHARS], candidate.node, elapsed_ms)


def _skip(item: Skipped) -> Attempt:
    return Attempt(item.tier, "skipped", item.reason[:_MAX_REASON_CHARS], item.node)
