"""The breaker, the retry budget and the lease by a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longshore_edge.balance import Load, PeakEwma
from longshore_edge.config import CoreSettings
from longshore_edge.cores import Core, Lease
from longshore_edge.health import MAX_COOLDOWN_S, Breaker, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_breaker_opens_probes_and_closes() -> None:
    clock = Clock()
    breaker = Breaker(clock, failure_threshold=3, cooldown_s=1.0)
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(2):
        breaker.failed()
    assert breaker.state == "closed"
    breaker.failed()
    assert (breaker.state, breaker.admits()) == ("open", False)
    clock.now_s += 1.0
    assert (breaker.state, breaker.admits()) == ("half-open", True)
    breaker.begin()
    assert not breaker.admits(), "one probe at a time"
    breaker.failed()
    assert breaker.retry_in_s() == 2.0
    clock.now_s += 2.0
    breaker.begin()
    breaker.abandoned()
    assert breaker.admits(), "a probe whose client left frees the place"
    breaker.begin()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_late_failures_of_older_requests_do_not_lengthen_the_cooldown() -> None:
    clock = Clock()
    breaker = Breaker(clock, failure_threshold=1, cooldown_s=1.0)
    for _ in range(10):
        breaker.failed()
    assert breaker.retry_in_s() == 1.0
    breaker.hint_ready()
    assert breaker.admits()


@given(st.integers(1, 40))
def test_cooldown_is_bounded(num_failures: int) -> None:
    clock = Clock()
    breaker = Breaker(clock, failure_threshold=1)
    for _ in range(num_failures):
        clock.now_s += 1000.0
        breaker.begin()
        breaker.failed()
    assert 0 < breaker.retry_in_s() <= MAX_COOLDOWN_S


def test_retry_budget() -> None:
    clock = Clock()
    budget = RetryBudget(clock, ratio=0.25, min_per_s=5.0)
    assert sum(budget.withdraw() for _ in range(50)) == 10
    for _ in range(40):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(50)) == 10
    clock.now_s += 1.0
    assert sum(budget.withdraw() for _ in range(50)) == 5


@given(st.lists(st.sampled_from(["first_token", "succeed", "fail", "abandon"]), max_size=6))
def test_a_lease_ends_once_whatever_is_called(calls: list[str]) -> None:
    clock = Clock()
    load = Load("c", 1.0, PeakEwma(0.1))
    core = Core(CoreSettings("c", "http://c"), load, Breaker(clock))
    lease = Lease(core, clock)
    assert (load.num_in_flight, load.num_waiting) == (1, 1)
    for name in calls:
        clock.now_s += 0.1
        getattr(lease, name)()
        assert load.num_in_flight in (0, 1) and load.num_waiting in (0, 1)
    lease.abandon()
    assert (load.num_in_flight, load.num_waiting) == (0, 0)
