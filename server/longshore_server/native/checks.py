"""Typed checks of numbers that come from outside; each failure names its field. No torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

ErrorType = Callable[[str, str], Exception]


def check_int(error: ErrorType, field: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises `error(field, message)` unless `value` is an int (no bool) within `low..high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise error(field, f"must be an integer, not {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise error(field, f"must be {_range(low, high)}, got {value}")


def check_float(
    error: ErrorType, field: str, value: Any, low: float, high: float | None = None, *, open_low: bool = False
) -> None:
    """Raises `error(field, message)` unless `value` is a finite number within `low..high`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise error(field, f"must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise error(field, "must be finite")
    if value < low or (open_low and value == low) or (high is not None and value > high):
        raise error(field, f"must be {_range(low, high, open_low)}, got {value}")


def _range(low: float, high: float | None, open_low: bool = False) -> str:
    if high is None:
        return f"{'above' if open_low else 'at least'} {low}"
    return f"{'above' if open_low else 'from'} {low} {'and at most' if open_low else 'to'} {high}"
