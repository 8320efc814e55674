"""Choosing among cores by live load: peak-EWMA with the power of two choices, and weighted least-connections.

Pure: the clock and the randomness are passed in. Knows no sockets and no health.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

DECAY_S = 10.0


@dataclass(slots=True)
class PeakEwma:
    """A moving average in seconds that jumps to every peak and forgets it with time constant `decay_s`.

    Without samples the value decays towards `prior_s`, so that a core which was slow once is tried again.
    After Finagle's peak-EWMA balancer.
    """

    prior_s: float
    decay_s: float = DECAY_S
    num_samples: int = 0
    _value_s: float = 0.0
    _updated_s: float = 0.0

    def observe(self, sample_s: float, now_s: float) -> None:
        """Take one measurement; a negative one (a clock's slip) counts as zero."""
        sample_s = max(0.0, sample_s)
        if not self.num_samples or sample_s >= self._value_s:
            self._value_s = sample_s
        else:
            keep = self._kept(now_s)
            self._value_s = self._value_s * keep + sample_s * (1.0 - keep)
        self.num_samples += 1
        self._updated_s = now_s

    def value_s(self, now_s: float) -> float:
        """The estimate now; the prior before the first sample."""
        if not self.num_samples:
            return self.prior_s
        if self._value_s <= self.prior_s:
            return self._value_s
        return self.prior_s + (self._value_s - self.prior_s) * self._kept(now_s)

    def _kept(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._updated_s) / self.decay_s)


@dataclass(slots=True)
class Load:
    """What one worker knows of a core's load; `num_waiting` of `num_in_flight` have no first token yet."""

    name: str
    weight: float
    ttft: PeakEwma
    num_in_flight: int = 0
    num_waiting: int = 0

    def cost(self, now_s: float) -> float:
        """Time to first token, times the requests in flight with this one, over weight."""
        return self.ttft.value_s(now_s) * (self.num_in_flight + 1) / self.weight

    def predicted_ttft_s(self, now_s: float) -> float:
        """When a request sent now would get its first token: the average, times those waiting for theirs."""
        return self.ttft.value_s(now_s) * (self.num_waiting + 1)

    def connections(self) -> float:
        """Requests in flight with this one, over weight."""
        return (self.num_in_flight + 1) / self.weight


@dataclass(frozen=True, slots=True)
class Choice:
    """The core chosen, and why in words with the live figures."""

    load: Load
    reason: str


@dataclass(slots=True)
class PeakEwmaPolicy:
    """The cheaper of two random candidates (Mitzenmacher 2001), by `Load.cost`."""

    random: random.Random = field(default_factory=random.Random)

    def choose(self, loads: Sequence[Load], now_s: float) -> Choice:
        """One of `loads`, which must not be empty."""
        if len(loads) == 1:
            return Choice(loads[0], f"the only candidate, {_figures(loads[0], now_s)}")
        first, second = self.random.sample(list(loads), 2)
        if second.cost(now_s) < first.cost(now_s):
            first, second = second, first
        return Choice(first, f"better of two: {_figures(first, now_s)}, against {_figures(second, now_s)}")


@dataclass(slots=True)
class LeastConnectionsPolicy:
    """The fewest requests in flight per weight; ties are broken at random."""

    random: random.Random = field(default_factory=random.Random)

    def choose(self, loads: Sequence[Load], now_s: float) -> Choice:
        """One of `loads`, which must not be empty."""
        fewest = min(load.connections() for load in loads)
        chosen = self.random.choice([load for load in loads if load.connections() == fewest])
        return Choice(
            chosen,
            f"fewest connections: {chosen.name} has {chosen.num_in_flight} in flight at weight"
            f" {chosen.weight:g}, of {len(loads)} candidates",
        )


Policy = PeakEwmaPolicy | LeastConnectionsPolicy


def make_policy(name: str, seed: random.Random) -> Policy:
    """The policy of that name: `peak-ewma` or `weighted-least-connections`."""
    return LeastConnectionsPolicy(seed) if name == "weighted-least-connections" else PeakEwmaPolicy(seed)


def _figures(load: Load, now_s: float) -> str:
    kind = "" if load.ttft.num_samples else " expected"
    return f"{load.name} {load.ttft.value_s(now_s) * 1e3:.0f} ms{kind} with {load.num_in_flight} in flight"
