"""Candidates and distances as properties."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from longshore_edge.geo import EARTH_RADIUS_KM, Place, distance_km
from longshore_edge.route import Option, candidates, model_is_unknown

places = st.builds(Place, st.floats(-90, 90), st.floats(-180, 180))
options = st.lists(
    st.builds(
        Option,
        st.uuids().map(str),
        st.none() | places,
        st.booleans(),
        st.sampled_from([None, True, False]),
    ),
    max_size=8,
)


@given(places, places, places)
def test_distance_is_a_metric_on_the_globe(a: Place, b: Place, c: Place) -> None:
    assert distance_km(a, a) < 1e-6
    assert math.isclose(distance_km(a, b), distance_km(b, a), abs_tol=1e-6)
    assert distance_km(a, b) <= math.pi * EARTH_RADIUS_KM + 1e-6
    assert distance_km(a, c) <= distance_km(a, b) + distance_km(b, c) + 1e-3


def test_known_distances() -> None:
    paris, london, sydney = Place(48.8566, 2.3522), Place(51.5074, -0.1278), Place(-33.8688, 151.2093)
    assert abs(distance_km(paris, london) - 344) < 2
    assert abs(distance_km(paris, sydney) - 16_960) < 30
    assert abs(distance_km(Place(0, 179.9), Place(0, -179.9)) - 22.2) < 0.2


@given(options, st.none() | places, st.integers(1, 5))
def test_candidates(items: list[Option], client: Place | None, limit: int) -> None:
    tried = frozenset(item.name for item in items[:1])
    usable = [
        item for item in items if item.is_well and item.has_model is not False and item.name not in tried
    ]
    chosen = candidates(items, client, limit=limit, tried=tried)
    assert all(item in usable for item in chosen)
    if client is None:
        assert chosen == usable
        return
    assert len(chosen) == min(limit, len(usable))

    def far_km(item: Option) -> float:
        return math.inf if item.place is None else distance_km(item.place, client)

    left_out = [item for item in usable if item not in chosen]
    assert [far_km(item) for item in chosen] == sorted(far_km(item) for item in chosen)
    assert all(far_km(a) <= far_km(b) for a in chosen for b in left_out)


def test_a_model_is_unknown_only_when_every_core_said_so() -> None:
    def option(has_model: bool | None) -> Option:
        return Option("x", None, True, has_model)

    assert not model_is_unknown([])
    assert model_is_unknown([option(False), option(False)])
    assert not model_is_unknown([option(False), option(None)])
    assert not model_is_unknown([option(False), option(True)])
