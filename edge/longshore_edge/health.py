"""Whether a core is well: a circuit breaker fed by requests, and active checks of /readyz beside it.

The breaker is pure; the clock is passed in. Owns no request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_COOLDOWN_S = 30.0


@dataclass(slots=True)
class Breaker:
    """Opens after `failure_threshold` failures in a row; lets one probe through after each cool-down.

    The cool-down doubles with every failed probe, up to MAX_COOLDOWN_S.
    """

    clock: Callable[[], float]
    failure_threshold: int = 3
    cooldown_s: float = 1.0
    _num_failures: int = 0
    _num_openings: int = 0
    _retry_at_s: float = 0.0
    _is_open: bool = False
    _is_probing: bool = False

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        if not self._is_open:
            return "closed"
        return "half-open" if self._is_probing or self.clock() >= self._retry_at_s else "open"

    def admits(self) -> bool:
        """True if a request may be sent now; asking changes nothing."""
        return not self._is_open or (not self._is_probing and self.clock() >= self._retry_at_s)

    def begin(self) -> None:
        """A request is being sent; in the half-open state it is the one probe."""
        if self._is_open:
            self._is_probing = True

    def succeeded(self) -> None:
        """The core answered: all is well."""
        self._num_failures = self._num_openings = 0
        self._is_open = self._is_probing = False

    def abandoned(self) -> None:
        """The request ended without telling anything of the core (the client left)."""
        self._is_probing = False

    def failed(self) -> None:
        """The core did not answer, or answered that it can't."""
        if self._is_open and not self._is_probing:
            return  # a request from before the opening; it tells nothing new
        self._num_failures += 1
        if self._is_probing or self._num_failures >= self.failure_threshold:
            self._open()

    def hint_ready(self) -> None:
        """An active check found the core ready: the next request may probe it at once."""
        self._retry_at_s = min(self._retry_at_s, self.clock())

    def _open(self) -> None:
        self._is_probing = False
        self._is_open = True
        self._retry_at_s = self.clock() + min(MAX_COOLDOWN_S, self.cooldown_s * 2.0**self._num_openings)
        self._num_openings = min(self._num_openings + 1, 16)

    def retry_in_s(self) -> float:
        """Seconds until the next probe; 0 when requests are admitted."""
        return max(0.0, self._retry_at_s - self.clock()) if self._is_open else 0.0


@dataclass(slots=True)
class RetryBudget:
    """Bounds retries to a share of the requests, so that a failing core is not buried in them.

    Each request deposits `ratio`, each retry takes one; `min_per_s` is granted besides.
    """

    clock: Callable[[], float]
    ratio: float = 0.2
    min_per_s: float = 5.0
    max_balance: float = 100.0
    _balance: float = 10.0
    _updated_s: float = math.nan

    def deposit(self) -> None:
        """A first attempt was made."""
        self._refill()
        self._balance = min(self.max_balance, self._balance + self.ratio)

    def withdraw(self) -> bool:
        """Take one retry; False when the budget is used up."""
        self._refill()
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True

    def _refill(self) -> None:
        now_s = self.clock()
        if not math.isnan(self._updated_s):
            gained = max(0.0, now_s - self._updated_s) * self.min_per_s
            self._balance = min(self.max_balance, self._balance + gained)
        self._updated_s = now_s
