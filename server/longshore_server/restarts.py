"""When a process that died may be started again. Pure bookkeeping: the time is passed in."""

from __future__ import annotations

from collections import deque

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 5.0


class RestartBudget:
    """At most `max_restarts` within `window_s`, each after a longer pause than the one before."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._restarts_s: deque[float] = deque(maxlen=max_restarts + 1)

    def next_delay_s(self, now_s: float) -> float | None:
        """The pause before the next start, or None when the budget is used up."""
        while self._restarts_s and now_s - self._restarts_s[0] > self._window_s:
            self._restarts_s.popleft()
        num_recent = len(self._restarts_s)
        if num_recent >= self._max_restarts:
            return None
        self._restarts_s.append(now_s)
        if num_recent == 0:
            return 0.0
        return float(min(_FIRST_DELAY_S * 4 ** (num_recent - 1), _MAX_DELAY_S))
