"""Lines of the table as they come, and the same as JSON. It measures nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from longshore_server.native.bench.measure import Result

_WORDS = {
    "tokens_per_s": "{:.0f} tok/s",
    "decode_tokens_per_s": "decode {:.0f} tok/s",
    "step_ms": "step {:.2f} ms",
    "share_of_copy": "{:.0%} of the copy bandwidth",
    "share_of_gemm": "{:.0%} of the GEMM peak",
    "ttft_ms": "ttft {:.1f} ms",
    "ttft_p50_ms": "ttft P50 {:.0f} ms",
    "ttft_p99_ms": "P99 {:.0f} ms",
    "gap_p50_ms": "gap P50 {:.1f} ms",
    "gap_p99_ms": "P99 {:.1f} ms",
    "offered_per_s": "{:g} req/s",
    "requests": "{:.0f} requests",
}
_SMALL_BELOW = 100
MAX_FAILURES_SHOWN = 5


def startup_line(startup: dict[str, float]) -> str:
    """Seconds since the process began."""
    moments = ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {at:.1f} s" for name, at in startup.items()
    )
    return f"since the process began: {moments}"


def line_of(result: Result) -> str:
    """One row of the table, and a line for each of the first failures."""
    cells = [_cell(name, value) for name, value in result.figures.items()]
    lines = [f"{result.row:<52} " + "  ".join(cells)]
    lines += [f"    FAILED {failure}" for failure in result.failures[:MAX_FAILURES_SHOWN]]
    num_more = len(result.failures) - MAX_FAILURES_SHOWN
    return "\n".join([*lines, f"    and {num_more} more failed"] if num_more > 0 else lines)


def _cell(name: str, value: float) -> str:
    words = _WORDS[name]
    if name.endswith("tokens_per_s") and value < _SMALL_BELOW:
        words = words.replace(".0f", ".1f")
    return words.format(value)


class JsonFile:
    """The report so far as one JSON object; the file is whole after every row."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._report: dict[str, Any] = {**head, "rows": []}

    def add(self, result: Result) -> None:
        self._report["rows"].append(
            {
                "row": result.row,
                "figures": _finite(result.figures),
                "rounds": [_finite(figures) for figures in result.rounds],
                "failures": result.failures,
            }
        )
        self.write()

    def write(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(self._report, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self._path)


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: the figure of a request that never came is null."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
