"""The live table of answers, one line as each comes in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from demo.questions import Case
from longshore.wire import Report

_HEAD = (
    f"{'#':>3}  {'kind':<8}{'question':<36}{'answer':<40}{'ok':<4}{'tier':<7}{'first':>7}{'tok/s':>7}  why"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One answered question. `ttft_ms` is the time to first text as the caller saw it."""

    case: Case
    text: str
    report: Report
    ttft_ms: float
    tokens_per_s: float

    @property
    def is_correct(self) -> bool:
        """Whether the answer states what the generator expects."""
        return self.case.is_correct(self.text)

    @property
    def tier(self) -> str:
        """Where the answer came from."""
        return self.report.served_by + ("*" if self.report.cached else "")

    @property
    def why(self) -> str:
        """The routers' own words, the client's first and then the edge's."""
        return self.report.reason or ""


class Table:
    """Prints rows as wide as the terminal allows."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._width = max(shutil.get_terminal_size((168, 40)).columns, 100)

    def head(self) -> None:
        """Print the column names."""
        print(_HEAD, flush=True)

    def add(self, row: Row) -> None:
        """Print one line."""
        self._num_rows += 1
        line = (
            f"{self._num_rows:>3}  {row.case.question.kind:<8}{_fit(row.case.question.text, 35):<36}"
            f"{_fit(row.text, 39):<40}{'yes' if row.is_correct else 'NO':<4}{row.tier:<7}"
            f"{row.ttft_ms:>5.0f}ms{row.tokens_per_s:>7.0f}  {row.why}"
        )
        print(line[: self._width], flush=True)


def _fit(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
