"""Which failures of an attempt permit another one elsewhere. Pure.

Nothing is ever tried again once a byte of the answer was passed on; that is the relay's to keep.
"""

from __future__ import annotations

from longshore.errors import (
    AnswerInterruptedError,
    ConnectionFailedError,
    DeadlineExceededError,
    EngineFailedError,
    LongshoreError,
    OverloadedError,
    RateLimitedError,
    TierError,
    UnavailableError,
    UpstreamError,
)

MAX_LOST = 1


def is_lost(error: LongshoreError) -> bool:
    """True if the core may have begun the work: a request that kills cores must not visit them all."""
    return isinstance(error, EngineFailedError | UpstreamError | AnswerInterruptedError)


def may_retry(error: LongshoreError, num_lost: int) -> bool:
    """True if another core may be asked, `num_lost` attempts having been lost before this one.

    A core that was not reached or that refused for lack of room did nothing. A tenant's own limit
    holds on every core.
    """
    if isinstance(error, RateLimitedError):
        return False
    if isinstance(error, ConnectionFailedError | UnavailableError | OverloadedError):
        return True
    return is_lost(error) and num_lost < MAX_LOST


def may_fall_back(error: LongshoreError) -> bool:
    """True if the student or a cached answer may stand in; not for a request at fault or out of time."""
    if isinstance(error, RateLimitedError | DeadlineExceededError):
        return False
    return isinstance(error, TierError | OverloadedError)


def is_cores_fault(error: LongshoreError) -> bool:
    """True if the failure counts against the core's health."""
    return isinstance(error, TierError) and not isinstance(error, DeadlineExceededError)
