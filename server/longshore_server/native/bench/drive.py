"""Drives an engine with requests at their arrival times and notes when each token came.

A request that is refused or fails is noted with its error and stays in the count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from longshore_server.native.bench.prompts import BenchRequest
from longshore_server.native.errors import NativeEngineError
from longshore_server.native.outputs import TokenOutput
from longshore_server.native.sampling_params import SamplingParams


class Steppable(Protocol):
    """What is needed of an engine."""

    def add_request(self, request_id: str, prompt_token_ids: Any, params: Any) -> None: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> list[TokenOutput]: ...


@dataclass(slots=True)
class RequestTimes:
    """One request's life in seconds since the start of the run; `error` is set when it did not end well."""

    request: BenchRequest
    token_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From the moment it was due, not the moment the engine had time for it; infinite if it failed."""
        return float("inf") if self.error is not None else self.token_s[0] - self.request.arrival_s

    @property
    def end_s(self) -> float:
        return float("inf") if self.error is not None else self.token_s[-1] - self.request.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in pairwise(self.token_s)]


@dataclass(frozen=True, slots=True)
class Run:
    """`step_s` are the moments at which a step returned at least one token."""

    times: list[RequestTimes]
    wall_s: float
    num_steps: int
    step_s: list[float]

    @property
    def failures(self) -> list[str]:
        return [f"{each.request.request_id}: {each.error}" for each in self.times if each.error is not None]

    @property
    def num_tokens(self) -> int:
        return sum(len(each.token_s) for each in self.times)


def drive(
    engine: Steppable,
    requests: Sequence[BenchRequest],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Runs all requests to their ends on an idle engine; arrivals do not wait for the engine."""
    times = {request.request_id: RequestTimes(request) for request in requests}
    pending = deque(sorted(requests, key=lambda request: request.arrival_s))
    step_s: list[float] = []
    num_steps = 0
    start_s = clock()
    while pending or engine.has_unfinished():
        now_s = clock() - start_s
        while pending and pending[0].arrival_s <= now_s:
            _add(engine, times[pending.popleft().request_id])
        if not engine.has_unfinished():
            if pending:
                sleep(max(0.0, pending[0].arrival_s - now_s))
            continue
        outputs = engine.step()
        num_steps += 1
        now_s = clock() - start_s
        if outputs:
            step_s.append(now_s)
        for output in outputs:
            _note(times[output.request_id], output, now_s)
    return Run(list(times.values()), clock() - start_s, num_steps, step_s)


def _add(engine: Steppable, times: RequestTimes) -> None:
    request = times.request
    params = SamplingParams(max_tokens=request.num_answer, temperature=0.0, ignore_eos=True)
    try:
        engine.add_request(request.request_id, request.prompt_token_ids, params)
    except NativeEngineError as error:
        times.error = str(error)


def _note(times: RequestTimes, output: TokenOutput, now_s: float) -> None:
    if output.token_id is not None:
        times.token_s.append(now_s)
        times.num_cached_tokens = output.num_cached_tokens
    if output.error is not None:
        times.error = output.error
    elif output.finish_reason is not None and len(times.token_s) != times.request.num_answer:
        times.error = f"ended ({output.finish_reason}) after {len(times.token_s)} tokens"
