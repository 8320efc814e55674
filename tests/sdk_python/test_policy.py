"""The routing policy and what it is fed by: properties over any measurement, and the words of its reasons."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.config import MODES, Mode, RoutingSettings
from longshore.errors import (
    AuthenticationError,
    ConnectionFailedError,
    DeadlineExceededError,
    QueueFullError,
    UpstreamError,
)
from longshore.measure import RetryBudget, TierMeter
from longshore.policy import (
    Candidate,
    RequestFacts,
    TierView,
    backoff_s,
    estimate_prompt_tokens,
    first_token_budget_ms,
    passed_over,
    plan,
)
from longshore.wire import TIERS, decode_any_request

SETTINGS = RoutingSettings()
FACTS = RequestFacts(num_prompt_tokens=100, max_tokens=50, remaining_ms=60_000, ttft_target_ms=300)

times = st.floats(0.1, 100_000)
maybe_times = st.none() | times


@st.composite
def views(draw: st.DrawFn) -> list[TierView]:
    made = []
    for number, tier in enumerate(draw(st.lists(st.sampled_from(TIERS), max_size=5))):
        made.append(
            TierView(
                tier,
                f"{tier}-{number}",
                ttft_ms=draw(maybe_times),
                ms_per_token=draw(maybe_times),
                age_ms=draw(times),
                prefill_tokens_per_s=draw(st.none() | st.floats(0.1, 1e6)) if tier == "device" else None,
                slowdown=draw(st.floats(0.01, 50)),
                num_in_flight=draw(st.integers(0, 100)),
                num_waiting=draw(st.integers(0, 100)),
                crowding=draw(st.floats(0, 2)),
                oldest_wait_ms=draw(st.just(0.0) | times),
                ready_in_ms=draw(st.just(0.0) | times),
                open_for_ms=draw(st.just(0.0) | times),
                busy_for_ms=draw(st.just(0.0) | times),
                last_error=draw(st.sampled_from(["", "upstream_failed"])),
                max_model_len=draw(st.none() | st.integers(1, 4096)),
                takes_images=draw(st.booleans()),
                image_ms=draw(st.floats(0, 1e4)),
                broken=draw(st.sampled_from(["", "bundle_damaged"])),
            )
        )
    return made


facts = st.builds(
    RequestFacts,
    num_prompt_tokens=st.integers(0, 5000),
    max_tokens=st.none() | st.integers(1, 5000),
    remaining_ms=st.floats(0.1, 1e6),
    ttft_target_ms=st.floats(1, 1e5),
    device_only=st.booleans(),
    num_images=st.integers(0, 3),
    answer_tokens=st.floats(1, 1000),
)
modes = st.sampled_from(MODES)


# -- which tiers -------------------------------------------------------------------------------


@given(views(), facts, modes)
def test_every_tier_is_either_a_candidate_or_skipped_with_a_reason(
    known: list[TierView], asked: RequestFacts, mode: Mode
) -> None:
    made = plan(known, asked, mode, SETTINGS)
    nodes = [item.node for item in (*made.candidates, *made.skipped)]
    assert sorted(nodes) == sorted(view.node for view in known)
    assert all(item.reason for item in (*made.candidates, *made.skipped))


@given(views(), facts, modes)
def test_only_permitted_tiers_are_candidates(known: list[TierView], asked: RequestFacts, mode: Mode) -> None:
    by_node = {view.node: view for view in known}
    for item in plan(known, asked, mode, SETTINGS).candidates:
        view = by_node[item.node]
        assert not (view.broken or view.open_for_ms or view.busy_for_ms)
        assert view.takes_images or not asked.num_images
        assert view.max_model_len is None or asked.num_prompt_tokens < view.max_model_len
        assert not mode.endswith("-only") or mode == f"{item.tier}-only"


@given(views(), facts, modes)
def test_private_requests_never_leave_the_device(
    known: list[TierView], asked: RequestFacts, mode: Mode
) -> None:
    made = plan(known, replace(asked, device_only=True), mode, SETTINGS)
    assert {item.tier for item in made.candidates} <= {"device"}


@given(views(), facts, modes, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_of_the_views(
    known: list[TierView], asked: RequestFacts, mode: Mode, random: object
) -> None:
    first = plan(known, asked, mode, SETTINGS)
    shuffled = list(known)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, asked, mode, SETTINGS).candidates == first.candidates


@given(views(), facts, modes, st.floats(1, 100))
def test_a_slower_twin_never_comes_first(
    known: list[TierView], asked: RequestFacts, mode: Mode, factor: float
) -> None:
    for view in known:
        slower = replace(
            view,
            node=view.node + "-slow",
            ttft_ms=None if view.ttft_ms is None else view.ttft_ms * factor,
            prefill_tokens_per_s=view.prefill_tokens_per_s and view.prefill_tokens_per_s / factor,
            ms_per_token=None if view.ms_per_token is None else view.ms_per_token * factor,
        )
        order = [item.node for item in plan([slower, view], asked, mode, SETTINGS).candidates]
        assert order in ([], [view.node, slower.node])


@given(views(), facts)
def test_auto_prefers_what_is_in_time_and_on_target(known: list[TierView], asked: RequestFacts) -> None:
    order = plan(known, asked, "auto", SETTINGS).candidates
    classes = [0 if item.in_time and item.on_target else 1 if item.in_time else 2 for item in order]
    assert classes == sorted(classes)
    good = [item for item in order if item.in_time and item.on_target]
    ranks = [("edge", "core", "device").index(item.tier) for item in good]
    assert ranks == sorted(ranks)
    late = [item.predicted_ttft_ms for item in order if item.in_time and not item.on_target]
    assert late == sorted(late)


@given(views(), facts)
def test_preferences_hold_whatever_is_measured(known: list[TierView], asked: RequestFacts) -> None:
    device_first = [item.tier for item in plan(known, asked, "prefer-device", SETTINGS).candidates]
    assert device_first == sorted(device_first, key=lambda tier: tier != "device")
    core_first = [item.tier for item in plan(known, asked, "prefer-core", SETTINGS).candidates]
    assert core_first == sorted(core_first, key=["core", "edge", "device"].index)


# -- predictions and words ---------------------------------------------------------------------


def candidate(view: TierView, asked: RequestFacts = FACTS) -> Candidate:
    return plan([view], asked, "auto", SETTINGS).candidates[0]


def test_unmeasured_tier_is_tried_even_below_a_sharp_target() -> None:
    sharp = replace(FACTS, ttft_target_ms=20)
    edge = candidate(TierView("edge", "e"), sharp)
    assert edge.on_target and not edge.is_measured
    device = TierView("device", "device", prefill_tokens_per_s=10_000, ms_per_token=5)
    assert plan([device, TierView("edge", "e")], sharp, "auto", SETTINGS).candidates[0].tier == "edge"


def test_slow_measurement_fades_and_the_tier_is_tried_again() -> None:
    slow = TierView("edge", "e", ttft_ms=5000, age_ms=0)
    assert not candidate(slow).on_target
    assert candidate(replace(slow, age_ms=SETTINGS.measure_half_life_s * 1000 * 8)).on_target


def test_a_request_that_waits_is_news_before_it_is_answered() -> None:
    assert candidate(TierView("edge", "e", ttft_ms=20, oldest_wait_ms=900)).predicted_ttft_ms == 900


def test_requests_ahead_make_the_next_one_wait() -> None:
    crowded = TierView("edge", "e", ttft_ms=50, num_waiting=10, crowding=0.8)
    assert candidate(crowded).predicted_ttft_ms == pytest.approx(450)


def test_device_prediction_comes_from_its_calibration_and_its_queue() -> None:
    idle = TierView("device", "device", prefill_tokens_per_s=2000, ms_per_token=2)
    assert candidate(idle).predicted_ttft_ms == pytest.approx(52)
    busy = replace(idle, num_in_flight=2)
    assert candidate(busy).predicted_ttft_ms == pytest.approx(52 + 2 * (52 + 64 * 2))
    assert candidate(replace(idle, slowdown=3.0)).predicted_ttft_ms == pytest.approx(156)


def test_reason_tells_the_live_figures() -> None:
    edge = TierView("edge", "e", ttft_ms=812)
    device = TierView("device", "device", prefill_tokens_per_s=100_000 / 22, ms_per_token=2)
    order = plan([edge, device], FACTS, "auto", SETTINGS).candidates
    assert [item.tier for item in order] == ["device", "edge"]
    assert order[0].reason == "edge predicted 812 ms > target 300 ms; device 24 ms"
    assert passed_over(order) == (order[1],)


def test_skips_tell_why_and_for_how_long() -> None:
    broken = TierView("core", "c", open_for_ms=1500, last_error="connection_failed")
    skipped = plan([broken, TierView("edge", "e", busy_for_ms=250)], FACTS, "auto", SETTINGS).skipped
    assert skipped[0].reason == "breaker open for another 1500 ms after connection_failed"
    assert skipped[0].retry_in_ms == 1500
    assert skipped[1].reason == "said it is busy for another 250 ms"


# -- time --------------------------------------------------------------------------------------


@given(views(), facts)
def test_first_token_budget_is_within_the_deadline_and_leaves_the_next_its_need(
    known: list[TierView], asked: RequestFacts
) -> None:
    order = plan(known, asked, "auto", SETTINGS).candidates
    for position in range(len(order)):
        rest = order[position + 1 :]
        budget_ms = first_token_budget_ms(asked.remaining_ms, rest)
        assert 0 < budget_ms <= asked.remaining_ms
        if budget_ms < asked.remaining_ms:
            assert asked.remaining_ms - budget_ms >= min(item.predicted_total_ms for item in rest)


@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 60))
def test_backoff_is_jittered_capped_and_minds_retry_after(
    num_rounds: int, unit: float, retry_after_s: float | None
) -> None:
    wait_s = backoff_s(num_rounds, unit, SETTINGS, retry_after_s)
    least_s = retry_after_s or 0.0
    assert least_s <= wait_s <= least_s + SETTINGS.backoff_cap_s


def test_each_picture_costs_the_device_its_encoding() -> None:
    device = TierView("device", "device", prefill_tokens_per_s=1e4, ms_per_token=1, image_ms=200)
    edge = TierView("edge", "edge", ttft_ms=500)
    asked = RequestFacts(100, 8, 10_000, ttft_target_ms=450)
    ttft_ms = [
        plan([device], replace(asked, num_images=number), "auto", SETTINGS).candidates[0].predicted_ttft_ms
        for number in range(3)
    ]
    assert [round(after - before) for before, after in itertools.pairwise(ttft_ms)] == [200, 200]
    order = [plan([edge, device], replace(asked, num_images=number), "auto", SETTINGS) for number in (1, 3)]
    assert [item.candidates[0].tier for item in order] == ["device", "edge"]


def test_prompt_estimates_grow_with_the_prompt() -> None:
    def estimate(body: dict[str, object]) -> int:
        return estimate_prompt_tokens(decode_any_request({"model": "m", **body}))

    assert estimate({"prompt": [[1, 2, 3], [4]]}) == 3
    assert estimate({"prompt": "x" * 400}) == 101
    text = {"messages": [{"role": "user", "content": "x" * 400}]}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert estimate(text) == 104
    assert estimate({"messages": [{"role": "user", "content": [image]}]}) > 200


# -- measurements ------------------------------------------------------------------------------


def measured(meter: TierMeter, begin_s: float, ttft_s: float, num_tokens: int = 11) -> None:
    ticket = meter.begin(begin_s)
    assert ticket is not None
    meter.first_token(ticket, begin_s + ttft_s)
    meter.finish(ticket, begin_s + ttft_s + (num_tokens - 1) * 0.01, num_tokens, from_cache=False)


def test_averages_follow_what_is_measured() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    measured(meter, 0.0, 0.1)
    view = meter.view(1.0)
    assert view.ttft_ms == pytest.approx(100)
    assert view.ms_per_token == pytest.approx(10)
    measured(meter, 1.0, 0.3)
    assert meter.view(2.0).ttft_ms == pytest.approx(200)  # slower news weighs half
    measured(meter, 2.0, 0.1)
    assert meter.view(3.0).ttft_ms == pytest.approx(170)  # better news weighs less


def test_an_answer_from_a_cache_says_nothing_of_speed() -> None:
    meter = TierMeter("edge", "e", SETTINGS)
    measured(meter, 0.0, 0.1)
    ticket = meter.begin(1.0)
    assert ticket is not None
    meter.first_token(ticket, 1.001)
    meter.finish(ticket, 1.002, 10, from_cache=True)
    assert meter.view(2.0).ttft_ms == pytest.approx(100)


def test_crowding_is_learnt_from_requests_that_waited_behind_others() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    measured(meter, 0.0, 0.1)
    before = meter.view(1.0).crowding
    tickets = [meter.begin(1.0) for _ in range(5)]
    for number, ticket in enumerate(tickets):
        assert ticket is not None
        meter.first_token(ticket, 1.0 + 0.1 * (number + 1))  # strictly one after another
    assert meter.view(2.0).crowding > before
    assert meter.view(2.0).ttft_ms == pytest.approx(100)


def test_in_flight_counts_end_whichever_way_a_request_ends() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    tickets = [meter.begin(0.0) for _ in range(3)]
    assert meter.view(0.5).num_in_flight == meter.view(0.5).num_waiting == 3
    assert meter.view(0.5).oldest_wait_ms == pytest.approx(500)
    assert all(tickets)
    meter.leave(tickets[0], 1.0)  # type: ignore[arg-type]
    meter.fail(tickets[1], 1.0, UpstreamError("x"))  # type: ignore[arg-type]
    meter.finish(tickets[2], 1.0, 3, from_cache=False)  # type: ignore[arg-type]
    assert meter.view(1.0).num_in_flight == 0


def test_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    for _ in range(SETTINGS.breaker_failures):
        ticket = meter.begin(0.0)
        assert ticket is not None
        meter.fail(ticket, 0.0, UpstreamError("x"))
    assert meter.begin(0.1) is None
    assert meter.view(0.1).last_error == "upstream_failed"
    after_s = SETTINGS.breaker_open_s + 0.1
    probe = meter.begin(after_s)
    assert probe is not None and probe.is_probe
    assert meter.begin(after_s) is None  # one probe at a time
    meter.first_token(probe, after_s + 0.05)
    assert meter.begin(after_s + 0.1) is not None


def test_breaker_waits_longer_each_time_up_to_its_bound() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    now_s, waits_s = 0.0, []
    for _ in range(12):
        ticket = meter.begin(now_s)
        assert ticket is not None
        meter.fail(ticket, now_s, ConnectionFailedError("refused"))
        waits_s.append(meter.view(now_s).open_for_ms / 1000)
        now_s += waits_s[-1]
    assert waits_s[:3] == pytest.approx([0.5, 1.0, 2.0])
    assert waits_s[-1] == SETTINGS.breaker_max_open_s


@pytest.mark.parametrize("error", [AuthenticationError("x"), QueueFullError("x", retry_after_s=2.0)])
def test_breaker_minds_the_tiers_faults_only(error: AuthenticationError | QueueFullError) -> None:
    meter = TierMeter("core", "c", SETTINGS)
    for _ in range(10):
        ticket = meter.begin(0.0)
        assert ticket is not None
        meter.fail(ticket, 0.0, error)
    assert meter.view(0.0).open_for_ms == 0
    assert meter.view(0.5).busy_for_ms == (1500 if error.retryable else 0)


def test_a_short_deadline_is_not_held_against_a_tier_but_a_long_silence_is() -> None:
    meter = TierMeter("core", "c", SETTINGS)
    for waited_s, is_open in ((0.01, False), (5.0, True)):
        for _ in range(SETTINGS.breaker_failures):
            ticket = meter.begin(0.0)
            assert ticket is not None
            meter.fail(ticket, waited_s, DeadlineExceededError("x"))
        assert (meter.view(waited_s).open_for_ms > 0) == is_open


def test_retry_budget_is_a_share_of_the_requests() -> None:
    budget = RetryBudget(SETTINGS)
    while budget.withdraw():
        pass
    allowed = 0
    for _ in range(100):
        budget.deposit()
        allowed += budget.withdraw()
    assert allowed == pytest.approx(100 * SETTINGS.retry_budget_ratio, abs=1)
