"""How long this process has run, imports and interpreter included. It starts nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED_S = time.monotonic()


def process_age_s() -> float:
    """Seconds since the kernel started this process; where there is no /proc, since this module's import."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), counted from the start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, AttributeError, ValueError):
        return time.monotonic() - _IMPORTED_S
