"""The choice of a picture's size: the golden vectors that Kotlin answers too, and what holds of any."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.device.resolution import (
    VisionCalibration,
    choose,
    choose_bucket,
    device_score,
    prior_calibration,
    useful_buckets,
)
from longshore.wire import VisionBucket

GOLDEN = Path(__file__).parents[3] / "examples" / "android" / "golden" / "buckets.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]

sides = st.integers(1, 32)
buckets = st.lists(
    st.builds(lambda w, h: VisionBucket(16 * w, 16 * h, w * h), sides, sides),
    min_size=1,
    max_size=8,
    unique=True,
)
pictures = st.tuples(st.integers(1, 6000), st.integers(1, 6000))
calibrations = st.builds(
    lambda small, more, small_ms, more_ms, rate: VisionCalibration(
        small, small_ms, small + more, small_ms + more_ms, rate
    ),
    st.integers(1, 10_000),
    st.integers(1, 10**6),
    st.floats(0.01, 100),
    st.floats(0, 10_000),
    st.floats(1, 1e5),
)
budgets = st.floats(0, 1e5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_golden_vectors(case: dict[str, Any]) -> None:
    measured = case["calibration"]
    calibration = VisionCalibration(*measured["small"], *measured["large"], measured["prefill_tokens_per_s"])
    given_buckets = [VisionBucket(*bucket) for bucket in case["buckets"]]
    chosen = choose_bucket(given_buckets, *case["image"], calibration, case["text_tokens"], case["budget_ms"])
    assert (chosen and [chosen.width_px, chosen.height_px]) == case["chosen"]


@given(buckets, pictures, calibrations, st.integers(0, 2000), budgets)
def test_a_choice_is_the_largest_useful_one_in_time(
    table: list[VisionBucket], picture: tuple[int, int], measured: VisionCalibration, text: int, budget: float
) -> None:
    chosen = choose_bucket(table, *picture, measured, text, budget)
    assert chosen is not None and chosen in useful_buckets(table, *picture)
    in_time = [
        bucket for bucket in useful_buckets(table, *picture) if measured.predicted_ms(bucket, text) <= budget
    ]
    if chosen in in_time:
        assert all(b.width_px * b.height_px <= chosen.width_px * chosen.height_px for b in in_time)
    else:
        assert not in_time and chosen == useful_buckets(table, *picture)[0]


@given(buckets, pictures, calibrations, st.integers(0, 2000), budgets, budgets)
def test_more_time_never_gives_less(
    table: list[VisionBucket],
    picture: tuple[int, int],
    measured: VisionCalibration,
    text: int,
    one_ms: float,
    other_ms: float,
) -> None:
    less, more = (
        choose_bucket(table, *picture, measured, text, budget) for budget in sorted((one_ms, other_ms))
    )
    assert less is not None and more is not None
    assert less.width_px * less.height_px <= more.width_px * more.height_px


@given(
    buckets,
    pictures,
    st.sampled_from(["auto", "low", "high"]),
    st.none() | calibrations,
    st.integers(0, 2000),
    budgets,
    st.integers(0, 1000),
)
def test_a_choice_says_why_it_is_no_larger(
    table: list[VisionBucket],
    picture: tuple[int, int],
    detail: Any,
    measured: VisionCalibration | None,
    text: int,
    budget: float,
    room: int,
) -> None:
    choice = choose(
        table,
        *picture,
        detail=detail,
        calibration=measured,
        num_text_tokens=text,
        budget_ms=budget,
        room_tokens=room,
    )
    useful = useful_buckets(table, *picture)
    larger = useful[useful.index(choice.bucket) + 1 :]
    if measured is not None:
        assert choice.predicted_ms == measured.predicted_ms(choice.bucket, text)
    match choice.why:
        case "full":
            assert choice.bucket == useful[-1]
        case "budget":
            assert measured is not None and detail == "auto"
            assert any(b.num_tokens <= room and measured.predicted_ms(b, text) > budget for b in larger)
        case "context":
            assert all(b.num_tokens > room for b in larger)
        case "quickest":
            assert (
                measured is not None
                and detail == "auto"
                and measured.predicted_ms(choice.bucket, text) > budget
            )
        case "asked":
            assert detail == "low" and larger
        case _:
            pytest.fail(choice.why)
    assert choice.bucket.num_tokens <= room or choice.bucket == useful[0]


@given(calibrations, st.integers(1, 10**6), st.floats(0.01, 1e5))
def test_a_measurement_moves_the_figures_towards_it(
    before: VisionCalibration, pixels: int, encode_ms: float
) -> None:
    expected = before.encode_ms(pixels)
    after = before.refined(pixels, encode_ms).encode_ms(pixels)
    if expected > 1e-3:
        low, high = sorted((expected, encode_ms))
        assert low * (1 - 1e-6) <= after <= high * (1 + 1e-6)
        assert 0.8 <= after / expected <= 1.51
    again = before
    for _ in range(200):
        again = again.refined(pixels, encode_ms)
    if expected > 1e-3:
        assert math.isclose(again.encode_ms(pixels), encode_ms, rel_tol=0.02)


def test_the_score_is_a_prior_that_more_cores_make_better() -> None:
    assert device_score(1, 0) == 1.0 == device_score(8, 1)
    scores = [device_score(cores, 0) for cores in (1, 2, 4, 8)]
    assert scores == sorted(set(scores)) and scores[-1] == device_score(64, 0) == device_score(64, 8)
    bucket = VisionBucket(256, 256, 256)
    times = [prior_calibration(score).predicted_ms(bucket, 50) for score in scores]
    assert times == sorted(times, reverse=True)


def test_a_model_without_buckets_takes_nothing() -> None:
    assert choose_bucket([], 10, 10, prior_calibration(1.0), 0, 1000) is None
