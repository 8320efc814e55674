"""What an edge asserts to the core about a request's sender: tenant, lane, limits; never taken from a body.

Plain data with bounds; signing and checking is `longshore.signing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval, Len

from longshore.wire import limits
from longshore.wire.request import Lane

ASSERTION_HEADER = "longshore-assertion"
MAX_ASSERTION_AGE_S = 60


@dataclass(frozen=True, slots=True)
class Assertion:
    """Short-lived statement of the edge `issuer`. Times are Unix seconds; it dies at `expires_at`.

    `best_lane` is the highest lane that the sender's key permits; `max_tokens` bounds one
    answer, None leaves it to the model.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"best_lane"})
    issuer: Annotated[str, Len(1, 64)]
    audience: Annotated[str, Len(1, 64)]
    tenant: Annotated[str, Len(1, 64)]
    issued_at: Annotated[int, Interval(ge=0, le=2**53)]
    expires_at: Annotated[int, Interval(ge=0, le=2**53)]
    best_lane: Lane = "standard"
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None
