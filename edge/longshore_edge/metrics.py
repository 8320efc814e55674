"""Counters, gauges and histograms of the edge as Prometheus text. Every label's values are a closed set.

With several workers each leaves its figures in a file of the state folder, and any one answers for all.
"""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

Labels = tuple[str, ...]

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES = frozenset({"served", "failed", "interrupted", "left", "refused"})
SOURCES = frozenset({"core", "student", "cache"})

_COUNTERS: dict[str, tuple[str, Labels]] = {
    "longshore:edge_requests_total": ("Requests by how they ended.", ("outcome",)),
    "longshore:edge_answers_total": ("Answers begun, by where they came from.", ("source",)),
    "longshore:edge_attempts_total": ("Attempts at cores by what came of them.", ("core", "outcome")),
    "longshore:edge_cache_total": ("Cache look-ups.", ("result",)),
    "longshore:edge_tokens_total": ("Token chunks passed on.", ()),
}
_GAUGES: dict[str, tuple[str, Labels]] = {
    "longshore:edge_requests_in_flight": ("Requests in flight.", ()),
    "longshore:edge_sockets_open": ("WebSockets open.", ()),
    "longshore:edge_cache_memory_bytes": ("Bytes of answers held in memory.", ()),
}
_HISTOGRAMS: dict[str, tuple[str, Labels]] = {
    "longshore:edge_ttft_seconds": ("Arrival to the first block of the answer.", ("source",)),
    "longshore:edge_request_seconds": ("Arrival to the end of the answer.", ()),
}


class Metrics:
    """The figures of one worker."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Labels, float]] = {name: {} for name in (*_COUNTERS, *_GAUGES)}
        self._counts: dict[str, dict[Labels, list[float]]] = {name: {} for name in _HISTOGRAMS}

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to a counter or, with either sign, to a gauge."""
        series = self._values[name]
        series[labels] = series.get(labels, 0.0) + by

    def set(self, name: str, value: float) -> None:
        """Set a gauge without labels."""
        self._values[name][()] = value

    def observe(self, name: str, value_s: float, *labels: str) -> None:
        """Add a duration to a histogram: one count per bucket, then the sum."""
        series = self._counts[name]
        counts = series.get(labels)
        if counts is None:
            counts = series[labels] = [0.0] * (len(BUCKETS_S) + 2)
        counts[bisect_left(BUCKETS_S, value_s)] += 1
        counts[-1] += value_s

    def snapshot(self) -> dict[str, list[tuple[Labels, list[float]]]]:
        """All figures as plain data, for another worker to add up."""
        plain = {
            name: [(labels, [value]) for labels, value in series.items()]
            for name, series in self._values.items()
        }
        return plain | {name: list(series.items()) for name, series in self._counts.items()}

    def add(self, snapshot: dict[str, list[tuple[Labels, list[float]]]]) -> None:
        """Add another worker's figures to these."""
        for name, series in snapshot.items():
            for labels, figures in series:
                self._add(name, tuple(labels), figures)

    def _add(self, name: str, labels: Labels, figures: list[float]) -> None:
        if name in self._values:
            self.count(name, *labels, by=figures[0])
        elif name in self._counts:
            mine = self._counts[name].setdefault(labels, [0.0] * len(figures))
            self._counts[name][labels] = [a + b for a, b in zip(mine, figures, strict=True)]

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        lines: list[str] = []
        for kind, table in (("counter", _COUNTERS), ("gauge", _GAUGES)):
            for name, (words, label_names) in table.items():
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
                for labels, value in self._values[name].items():
                    lines.append(f"{name}{_braced(label_names, labels)} {value:g}")
        for name, (words, label_names) in _HISTOGRAMS.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} histogram"]
            for labels, counts in self._counts[name].items():
                lines += _histogram(name, label_names, labels, counts)
        return ("\n".join(lines) + "\n").encode()


def _histogram(name: str, label_names: Labels, labels: Labels, counts: list[float]) -> Iterator[str]:
    total = 0.0
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), counts, strict=False):
        total += count
        yield f"{name}_bucket{_braced((*label_names, 'le'), (*labels, bound))} {total:g}"
    yield f"{name}_sum{_braced(label_names, labels)} {counts[-1]:g}"
    yield f"{name}_count{_braced(label_names, labels)} {total:g}"


def _braced(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + pairs + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class SharedMetrics:
    """Figures of all workers, through one file each, replaced atomically."""

    def __init__(self, folder: Path, mine: Metrics) -> None:
        self._folder = folder
        self._mine = mine
        self._name = f"metrics-{os.getpid()}.json"

    def write(self) -> None:
        """Leave this worker's figures."""
        fresh = self._folder / (self._name + ".new")
        with contextlib.suppress(OSError):
            fresh.write_text(json.dumps(self._mine.snapshot()))
            fresh.replace(self._folder / self._name)

    def render(self) -> bytes:
        """The figures of all workers together, this one's as of now, the others' as last written."""
        total = Metrics()
        total.add(self._mine.snapshot())
        for path in self._folder.glob("metrics-*.json"):
            if path.name != self._name:
                with contextlib.suppress(OSError, ValueError):
                    total.add(json.loads(path.read_text()))
        return total.render()
