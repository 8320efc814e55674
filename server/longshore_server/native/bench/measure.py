"""Measures one row on an engine: warm-up apart from measurement, medians over rounds, failures kept.

It prints nothing; what the device could do at best comes in as ceilings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import median
from typing import Any

from longshore_server.native.bench.ceilings import Ceilings
from longshore_server.native.bench.drive import RequestTimes, Run, drive
from longshore_server.native.bench.models import ModelCost
from longshore_server.native.bench.percentiles import percentile
from longshore_server.native.bench.prompts import (
    BenchRequest,
    decode_requests,
    first_token_request,
    mixed_requests,
    poisson_requests,
    prefix_requests,
)
from longshore_server.native.bench.rows import Decode, FirstToken, Mixed, Poisson, Row, name_of

WARM_UP_TOKENS = 32
POISSON_WARM_UP_S = 4.0
MIN_POISSON_WARM_UP = 8
MAX_RATE_PER_S = 4096.0


@dataclass(frozen=True, slots=True)
class Settings:
    """`poisson_s` is how long arrivals last, with at least `min_poisson_requests` of them."""

    rounds: int = 3
    seed: int = 0
    max_p99_ttft_s: float = 0.35
    poisson_s: float = 20.0
    min_poisson_requests: int = 200


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. `figures` are medians over `rounds`; their names end in their units."""

    row: str
    figures: dict[str, float]
    rounds: list[dict[str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Bench:
    """Rows measured one after the other on one engine; each prompt is drawn afresh."""

    def __init__(
        self,
        engine: Any,
        settings: Settings,
        ceilings: Ceilings | None,
        cost: ModelCost | None,
        clock: Callable[[], float],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._ceilings = ceilings
        self._cost = cost
        self._clock = clock
        self._sleep = sleep
        self._seeds = count(settings.seed)

    def measure(self, row: Row) -> Iterator[Result]:
        """The row's results, each as soon as it is there: one, or one for each rate of a search."""
        if isinstance(row, Poisson):
            yield from self._search(row) if row.rate_per_s is None else [self._poisson(row, row.rate_per_s)]
            return
        self._warm_up(row)
        runs = [self._round(row) for _ in range(self._settings.rounds)]
        figures = [
            self._decode_figures(run) if isinstance(row, Decode) else self._figures(row, run) for run in runs
        ]
        yield Result(
            name_of(row), _medians(figures), figures, [line for run in runs for line in run.failures]
        )

    def _requests(self, row: Decode | FirstToken | Mixed) -> list[BenchRequest]:
        vocab_size, seed = self._engine.vocab_size, next(self._seeds)
        if isinstance(row, Decode):
            return decode_requests(row, vocab_size, seed)
        if isinstance(row, FirstToken):
            return first_token_request(row, vocab_size, seed)
        return mixed_requests(row, vocab_size, seed, self._settings.seed)

    def _warm_up(self, row: Decode | FirstToken | Mixed) -> None:
        """The row's own work with short answers, twice: what is captured in the background is ready then."""
        for _ in range(2):
            requests = self._requests(
                replace(row, num_answer=min(row.num_answer, WARM_UP_TOKENS))
                if isinstance(row, Decode)
                else row
            )
            if isinstance(row, Mixed):
                requests = [replace(r, num_answer=min(r.num_answer, WARM_UP_TOKENS)) for r in requests]
            self._run(requests)

    def _round(self, row: Decode | FirstToken | Mixed) -> Run:
        if isinstance(row, FirstToken) and row.idle_ms:
            self._sleep(row.idle_ms / 1e3)
        return self._run(self._requests(row))

    def _run(self, requests: list[BenchRequest]) -> Run:
        run = drive(self._engine, requests, clock=self._clock, sleep=self._sleep)
        self._engine.settle()  # what it began to capture is there for the next run, and not beside it
        return run

    # --- offline rows ---

    def _decode_figures(self, run: Run) -> dict[str, float]:
        """All tokens over the whole time, and apart from it the steps after every stream has begun."""
        good = [times for times in run.times if times.error is None]
        if not good:
            return {}
        begun_s = max(times.token_s[0] for times in good)
        steps = [moment for moment in run.step_s if moment > begun_s]
        num_decoded = sum(moment > begun_s for times in good for moment in times.token_s)
        figures = {
            "tokens_per_s": run.num_tokens / run.wall_s,
            "ttft_ms": 1e3 * median(times.ttft_s for times in good),
        }
        if not steps:
            return figures
        decode_s = steps[-1] - begun_s
        figures |= {"decode_tokens_per_s": num_decoded / decode_s, "step_ms": 1e3 * decode_s / len(steps)}
        if self._cost is not None and self._ceilings is not None:
            num_context = sum(_context_tokens(times, begun_s) for times in good)
            num_bytes = self._cost.decode_bytes(len(steps), num_context)
            figures["share_of_copy"] = num_bytes / decode_s / self._ceilings.copy_bytes_per_s
        return figures

    def _figures(self, row: FirstToken | Mixed, run: Run) -> dict[str, float]:
        good = [times for times in run.times if times.error is None]
        if not good:
            return {}
        if isinstance(row, Mixed):
            figures = {"tokens_per_s": run.num_tokens / run.wall_s} | _latencies(run.times)
        else:
            figures = {"ttft_ms": 1e3 * good[0].ttft_s}
        return figures | self._shares(good, run)

    def _shares(self, good: list[RequestTimes], run: Run) -> dict[str, float]:
        """Of both limits, over the whole time: each step reads the weights, each decode its context."""
        if self._cost is None or self._ceilings is None:
            return {}
        num_prompt = sum(len(times.request.prompt_token_ids) - times.num_cached_tokens for times in good)
        num_sampled = sum(len(times.token_s) for times in good)
        num_decoded = sum(_context_tokens(times, times.token_s[0]) for times in good)
        num_context = num_decoded + sum(_prompt_pairs(times) for times in good)
        flops = self._cost.flops(num_prompt + num_sampled - len(good), num_sampled, num_context)
        num_bytes = self._cost.decode_bytes(len(run.step_s), num_decoded)
        return {
            "share_of_copy": num_bytes / run.wall_s / self._ceilings.copy_bytes_per_s,
            "share_of_gemm": flops / run.wall_s / self._ceilings.gemm_flops_per_s,
        }

    # --- Poisson ---

    def _poisson(self, row: Poisson, rate_per_s: float) -> Result:
        """One open-loop run, after a shorter one with other prompts: a service that runs has met its batch
        sizes before, and has its shared prefixes cached.
        """
        settings = self._settings
        num_requests = max(settings.min_poisson_requests, round(rate_per_s * settings.poisson_s))
        num_warm_up = min(num_requests, max(MIN_POISSON_WARM_UP, round(rate_per_s * POISSON_WARM_UP_S)))
        for num in (num_warm_up, num_requests):
            requests = poisson_requests(row, rate_per_s, num, self._engine.vocab_size, next(self._seeds))
            self._run(prefix_requests(requests, row))
            run = self._run(requests)
        good = [times for times in run.times if times.error is None]
        figures = {"offered_per_s": rate_per_s, "requests": len(run.times)}
        if good:
            figures |= {"tokens_per_s": run.num_tokens / run.wall_s} | _latencies(run.times)
            figures |= self._shares(good, run)
        return Result(name_of(replace(row, rate_per_s=rate_per_s)), figures, [figures], run.failures)

    def _is_within(self, result: Result) -> bool:
        return not result.failures and result.figures["ttft_p99_ms"] <= 1e3 * self._settings.max_p99_ttft_s

    def _search(self, row: Poisson) -> Iterator[Result]:
        """Doubles the rate until the bound is broken, then halves the gap down to about 6%."""
        good, bad = 0.0, float("inf")
        rate_per_s = 1.0
        best: Result | None = None
        while bad - good > max(0.06 * good, 0.25) and rate_per_s <= MAX_RATE_PER_S:
            result = self._poisson(row, rate_per_s)
            yield result
            if self._is_within(result):
                good, best = rate_per_s, result
            else:
                bad = rate_per_s
            rate_per_s = 2 * good if bad == float("inf") else (good + bad) / 2
        bound = f"P99 ttft <= {1e3 * self._settings.max_p99_ttft_s:g} ms"
        yield Result(f"poisson: highest rate, {bound}", best.figures if best else {"offered_per_s": 0.0})


def _latencies(times: list[RequestTimes]) -> dict[str, float]:
    """Failed requests count as endless, so that they cannot better a percentile."""
    ttfts = [each.ttft_s for each in times]
    gaps = [gap for each in times for gap in each.gaps_s] or [0.0]
    return {
        "ttft_p50_ms": 1e3 * percentile(ttfts, 50),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 99),
        "gap_p50_ms": 1e3 * percentile(gaps, 50),
        "gap_p99_ms": 1e3 * percentile(gaps, 99),
    }


def _context_tokens(times: RequestTimes, after_s: float) -> int:
    """Tokens attended by the decode rows whose token came later than `after_s`."""
    num_prompt = len(times.request.prompt_token_ids)
    return sum(num_prompt + index for index, moment in enumerate(times.token_s) if index and moment > after_s)


def _prompt_pairs(times: RequestTimes) -> int:
    """(row, token) pairs that the prompt's causal attention computes."""
    num_prompt, num_cached = len(times.request.prompt_token_ids), times.num_cached_tokens
    return (num_prompt * (num_prompt + 1) - num_cached * (num_cached + 1)) // 2


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: median(figures[name] for figures in rounds if name in figures) for name in names}
