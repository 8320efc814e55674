"""The balancing policies as properties: no clock, no socket, no sleep."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from longshore_edge.balance import (
    DECAY_S,
    LeastConnectionsPolicy,
    Load,
    PeakEwma,
    PeakEwmaPolicy,
    make_policy,
)

seconds = st.floats(0, 100)
samples = st.lists(st.tuples(st.floats(0, 5), seconds), min_size=1, max_size=30)


def load(name: str, ttft_s: float, in_flight: int = 0, weight: float = 1.0) -> Load:
    ewma = PeakEwma(0.1)
    ewma.observe(ttft_s, 0.0)
    return Load(name, weight, ewma, in_flight)


loads = st.lists(
    st.builds(load, st.text(max_size=3), st.floats(0.001, 5), st.integers(0, 50), st.floats(0.1, 10)),
    min_size=1,
    max_size=6,
)


@given(samples)
def test_ewma_stays_between_its_samples_and_jumps_to_peaks(steps: list[tuple[float, float]]) -> None:
    ewma, now_s = PeakEwma(prior_s=0.0), 0.0
    for pause_s, sample_s in steps:
        now_s += pause_s
        before_s = ewma.value_s(now_s)
        ewma.observe(sample_s, now_s)
        assert ewma.value_s(now_s) >= min(sample_s, before_s) - 1e-9
        assert ewma.value_s(now_s) <= max(sample for _, sample in steps) + 1e-9
        if sample_s >= before_s and ewma.num_samples == 1:
            assert ewma.value_s(now_s) == sample_s
    peak_s = ewma.value_s(now_s) + 1
    ewma.observe(peak_s, now_s)
    assert ewma.value_s(now_s) == peak_s


@given(st.floats(0.2, 100), st.floats(0, 1000))
def test_ewma_decays_towards_its_prior(sample_s: float, pause_s: float) -> None:
    ewma = PeakEwma(prior_s=0.1)
    assert ewma.value_s(0.0) == 0.1
    ewma.observe(sample_s, 0.0)
    assert 0.1 <= ewma.value_s(pause_s) <= sample_s
    assert ewma.value_s(pause_s + DECAY_S) <= ewma.value_s(pause_s)
    assert ewma.value_s(100 * DECAY_S) < 0.1 + 1e-6


@given(loads, st.integers(0, 2**32))
def test_policies_choose_a_candidate_and_the_better_of_what_they_saw(items: list[Load], seed: int) -> None:
    chosen = PeakEwmaPolicy(random.Random(seed)).choose(items, 0.0)
    assert chosen.load in items
    assert str(chosen.load.num_in_flight) in chosen.reason
    if len(items) == 2:
        assert chosen.load.cost(0.0) == min(item.cost(0.0) for item in items)
    least = LeastConnectionsPolicy(random.Random(seed)).choose(items, 0.0)
    assert least.load.connections() == min(item.connections() for item in items)


@given(st.integers(0, 2**32))
def test_the_worst_of_many_is_never_chosen(seed: int) -> None:
    items = [load(f"c{number}", 0.05 + number / 100) for number in range(4)] + [load("worst", 4.0)]
    policy = PeakEwmaPolicy(random.Random(seed))
    assert all(policy.choose(items, 0.0).load.name != "worst" for _ in range(50))


def test_weights_share_out_the_work() -> None:
    """Least connections keeps the requests in flight in the ratio of the weights."""
    items = [load("one", 0.1, weight=1.0), load("three", 0.1, weight=3.0)]
    policy = make_policy("weighted-least-connections", random.Random(7))
    for _ in range(400):
        policy.choose(items, 0.0).load.num_in_flight += 1
    counts = Counter({item.name: item.num_in_flight for item in items})
    assert 95 <= counts["one"] <= 105


def test_prediction_counts_only_those_that_wait() -> None:
    item = load("c", 0.2, in_flight=10)
    assert item.predicted_ttft_s(0.0) == 0.2
    item.num_waiting = 2
    assert abs(item.predicted_ttft_s(0.0) - 0.6) < 1e-9
