"""Percentiles of a sample by the nearest-rank method: always a value that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` (0 < percent <= 100) of `values` do not exceed."""
    assert values and 0 < percent <= 100
    rank = math.ceil(len(values) * percent / 100 - 1e-9)  # 0.29 * 100 is 28.999..., not rank 30 of 29
    return sorted(values)[max(rank, 1) - 1]
