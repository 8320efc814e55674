"""What is measured of each tier while it is used: moving averages, requests in flight, a breaker.

Every method takes the time, so that nothing here owns a clock; one lock per tier, held for
arithmetic only. Gives `policy.TierView` snapshots; decides nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from longshore.config import RoutingSettings
from longshore.errors import (
    CancelledError,
    ConfigError,
    ConnectionFailedError,
    DeadlineExceededError,
    LongshoreError,
    OverloadedError,
    RequestError,
)
from longshore.policy import TierView, prior_ttft_ms
from longshore.wire import Tier

_MIN_SLOWDOWN = 0.5
_MAX_SLOWDOWN = 50.0
_MAX_CROWDING = 2.0
_SHORTEST_MS = 0.1
_BUSY_WITHOUT_HINT_S = 0.25


@dataclass(frozen=True, slots=True)
class _Averages:
    """`ttft_ms` is that of a request that waits alone; each one ahead adds the share `crowding` to it."""

    ttft_ms: float | None = None
    crowding: float = 0.25
    slowdown: float = 1.0
    updated_s: float = 0.0


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in flight at a tier; times are of the caller's monotonic clock, in seconds."""

    started_s: float
    basis_ms: float = 0.0
    first_token_s: float | None = None
    is_probe: bool = False
    num_ahead: int = 0
    averages_before: _Averages | None = None
    version: int = 0


class Breaker:
    """Closed, open for a while after failures in a row, then one probe decides.

    A tier that can't even be connected to opens it at once; the wait doubles up to a bound.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self._num_failures = 0
        self._next_open_s = settings.breaker_open_s
        self._open_until_s: float | None = None
        self._probe_in_flight = False

    def open_for_s(self, now_s: float) -> float:
        """How long no request may pass; 0 when one may (as a probe, if it was open)."""
        if self._open_until_s is None:
            return 0.0
        if self._probe_in_flight:
            return self._settings.breaker_open_s
        return max(0.0, self._open_until_s - now_s)

    def enter(self, now_s: float) -> bool:
        """Let a request pass; True if it is the probe. Ask `open_for_s` first."""
        if self._open_until_s is None:
            return False
        self._probe_in_flight = True
        return True

    def succeed(self) -> None:
        """An answer began: close."""
        self._num_failures = 0
        self._next_open_s = self._settings.breaker_open_s
        self._open_until_s = None
        self._probe_in_flight = False

    def fail(self, now_s: float, *, at_once: bool) -> None:
        """The tier failed; open where that was one too many."""
        self._num_failures += 1
        if self._probe_in_flight or at_once or self._num_failures >= self._settings.breaker_failures:
            self._open_until_s = now_s + self._next_open_s
            self._next_open_s = min(self._next_open_s * 2, self._settings.breaker_max_open_s)
        self._probe_in_flight = False

    def forget_probe(self, ticket: Ticket) -> None:
        """The probe ended without telling anything; the next request is the probe."""
        if ticket.is_probe:
            self._probe_in_flight = False


class TierMeter:
    """Live measurements of one tier."""

    def __init__(self, tier: Tier, node: str, settings: RoutingSettings) -> None:
        self.tier = tier
        self.node = node
        self._settings = settings
        self._lock = threading.Lock()
        self._breaker = Breaker(settings)
        self._open: set[Ticket] = set()
        self._averages = _Averages(crowding=settings.prior_crowding)
        self._ms_per_token: float | None = None
        self._version = 0
        self._busy_until_s = 0.0
        self._last_error = ""
        self._answer_tokens: float | None = None

    @property
    def answer_tokens(self) -> float | None:
        """How long answers were on average, in tokens; None before the first."""
        return self._answer_tokens

    # -- one request ---------------------------------------------------------------------------

    def begin(self, now_s: float, basis_ms: float = 0.0) -> Ticket | None:
        """Enter a request; None if the breaker lets nothing pass just now."""
        with self._lock:
            if self._breaker.open_for_s(now_s) > 0:
                return None
            num_ahead = sum(other.first_token_s is None for other in self._open)
            is_probe = self._breaker.enter(now_s)
            ticket = Ticket(now_s, basis_ms, is_probe=is_probe, num_ahead=num_ahead)
            self._open.add(ticket)
            return ticket

    def first_token(self, ticket: Ticket, now_s: float) -> None:
        """The first token came: the tier works, and this is how long it took."""
        with self._lock:
            ticket.first_token_s = now_s
            self._breaker.succeed()
            self._busy_until_s = 0.0
            self._last_error = ""
            ticket.averages_before = self._averages
            self._sample(ticket, (now_s - ticket.started_s) * 1000, now_s)
            ticket.version = self._version

    def finish(self, ticket: Ticket, now_s: float, num_tokens: int, *, from_cache: bool) -> None:
        """The answer is whole. One from a cache says nothing of the tier's speed."""
        with self._lock:
            self._open.discard(ticket)
            if from_cache:
                self._take_back(ticket)
            elif ticket.first_token_s is not None and num_tokens > 1:
                sample_ms = (now_s - ticket.first_token_s) * 1000 / (num_tokens - 1)
                self._ms_per_token = self._average(self._ms_per_token, sample_ms)
            self._answer_tokens = self._average(self._answer_tokens, float(max(num_tokens, 1)))

    def fail(self, ticket: Ticket, now_s: float, error: LongshoreError) -> None:
        """The request failed here; remember what that says of the tier."""
        with self._lock:
            self._open.discard(ticket)
            if isinstance(error, OverloadedError):
                self._breaker.forget_probe(ticket)
                self._busy_until_s = now_s + (error.retry_after_s or _BUSY_WITHOUT_HINT_S)
            elif isinstance(error, RequestError | CancelledError | ConfigError):
                self._breaker.forget_probe(ticket)
            elif isinstance(error, DeadlineExceededError):
                self._fail_late(ticket, now_s, error)
            else:
                self._breaker.fail(now_s, at_once=isinstance(error, ConnectionFailedError))
                self._last_error = error.code

    def _fail_late(self, ticket: Ticket, now_s: float, error: DeadlineExceededError) -> None:
        """A short deadline is the caller's; only a long silence is held against the tier."""
        waited_ms = (now_s - ticket.started_s) * 1000
        if ticket.first_token_s is None:
            self._at_least(ticket, waited_ms, now_s)
        if ticket.first_token_s is None and waited_ms >= self._settings.hang_ms:
            self._breaker.fail(now_s, at_once=False)
            self._last_error = error.code
        else:
            self._breaker.forget_probe(ticket)

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """The caller gave up; a wait longer than the average so far still counts."""
        with self._lock:
            self._open.discard(ticket)
            self._breaker.forget_probe(ticket)
            if ticket.first_token_s is None:
                self._at_least(ticket, (now_s - ticket.started_s) * 1000, now_s)

    # -- averages (the lock is held) -----------------------------------------------------------

    def _sample(self, ticket: Ticket, ttft_ms: float, now_s: float) -> None:
        old = self._averages
        alone_ms, crowding, slowdown = old.ttft_ms, old.crowding, old.slowdown
        if alone_ms is None or ticket.num_ahead == 0:
            alone_ms = self._average(alone_ms, ttft_ms / (1 + ticket.num_ahead * crowding))
        else:
            share = (ttft_ms / max(alone_ms, _SHORTEST_MS) - 1) / ticket.num_ahead
            crowding = self._average(crowding, min(max(share, 0.0), _MAX_CROWDING))
        if ticket.basis_ms > 0:
            ratio = min(max(ttft_ms / ticket.basis_ms, _MIN_SLOWDOWN), _MAX_SLOWDOWN)
            slowdown = self._average(slowdown, ratio)
        self._averages = _Averages(alone_ms, crowding, slowdown, now_s)
        self._version += 1

    def _at_least(self, ticket: Ticket, waited_ms: float, now_s: float) -> None:
        known_ms = self._averages.ttft_ms
        if known_ms is None:
            known_ms = prior_ttft_ms(self.tier, self._settings)
        if waited_ms > known_ms * (1 + ticket.num_ahead * self._averages.crowding):
            self._sample(ticket, waited_ms, now_s)

    def _take_back(self, ticket: Ticket) -> None:
        if ticket.averages_before is not None and ticket.version == self._version:
            self._averages = ticket.averages_before

    def _average(self, value: float | None, sample: float) -> float:
        if value is None:
            return sample
        weight = self._settings.weight_up if sample > value else self._settings.weight_down
        return value + weight * (sample - value)

    # -- snapshot ------------------------------------------------------------------------------

    def view(self, now_s: float) -> TierView:
        """What is known now."""
        with self._lock:
            waiting = [ticket.started_s for ticket in self._open if ticket.first_token_s is None]
            return TierView(
                self.tier,
                self.node,
                ttft_ms=self._averages.ttft_ms,
                ms_per_token=self._ms_per_token,
                age_ms=max(0.0, now_s - self._averages.updated_s) * 1000,
                slowdown=self._averages.slowdown,
                num_in_flight=len(self._open),
                num_waiting=len(waiting),
                crowding=self._averages.crowding,
                oldest_wait_ms=max(0.0, now_s - min(waiting)) * 1000 if waiting else 0.0,
                open_for_ms=self._breaker.open_for_s(now_s) * 1000,
                busy_for_ms=max(0.0, self._busy_until_s - now_s) * 1000,
                last_error=self._last_error,
            )


class RetryBudget:
    """Lets repeated rounds be at most a share of the requests, plus a small reserve (Finagle's idea)."""

    def __init__(self, settings: RoutingSettings) -> None:
        self._ratio = settings.retry_budget_ratio
        self._most = settings.retry_budget_reserve
        self._tokens = settings.retry_budget_reserve
        self._lock = threading.Lock()

    def deposit(self) -> None:
        """A new request came."""
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """True if a further round is allowed."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True
