"""Which cores are candidates for a request: those that have the model and are well, the nearest few first.

Pure. Live latency decides among them (`balance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longshore_edge.geo import Place, distance_km


@dataclass(frozen=True, slots=True)
class Option:
    """A core as routing sees it. `has_model` is None while nobody has told what the core serves."""

    name: str
    place: Place | None
    is_well: bool
    has_model: bool | None


def candidates(
    options: Sequence[Option], client: Place | None, *, limit: int, tried: frozenset[str] = frozenset()
) -> list[Option]:
    """The at most `limit` cores to choose from, nearest first; all when the client's place is unknown.

    Cores without a known place come after those with one.
    """
    usable = [
        option
        for option in options
        if option.is_well and option.has_model is not False and option.name not in tried
    ]
    if client is None:
        return usable
    return sorted(usable, key=lambda option: _distance_km(option, client))[:limit]


def model_is_unknown(options: Sequence[Option]) -> bool:
    """True when every core has said what it serves and none has the model."""
    return bool(options) and all(option.has_model is False for option in options)


def _distance_km(option: Option, client: Place) -> float:
    return float("inf") if option.place is None else distance_km(option.place, client)
