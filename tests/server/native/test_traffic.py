"""Random requests with aborts, preemptions and swaps, steps plain and overlapped: all end, books stay clean.

`make fuzz` sends 10,000 of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from late_runner import LateRunner
from longshore_server.native import NativeEngine, SamplingParams

REQUESTS_PER_EXAMPLE = 5
MAX_LIVE = 40
STEPS_PER_CHECK = 200


class Traffic:
    """A user of the engine that does everything an engine lets it do, at random."""

    def __init__(self, engine: NativeEngine, num_requests: int) -> None:
        self.engine, self.num_requests = engine, num_requests
        self.chosen = random.Random(11)
        self.num_added = self.num_ended = 0
        self.live: dict[str, None] = {}
        self.held: dict[str, None] = {}

    def run(self) -> None:
        num_steps = 0
        while self.num_ended < self.num_requests:
            while self.num_added < self.num_requests and len(self.live) < MAX_LIVE:
                self.add()
            self.disturb()
            for output in self.engine.step():
                assert output.error is None
                if output.finish_reason is not None:
                    del self.live[output.request_id]
                    self.held.pop(output.request_id, None)
                    self.num_ended += 1
            num_steps += 1
            if num_steps % STEPS_PER_CHECK == 0:
                self.engine.check_integrity()

    def add(self) -> None:
        chosen, name = self.chosen, f"r{self.num_added}"
        params = SamplingParams(
            max_tokens=chosen.randrange(1, 9),
            temperature=chosen.choice([0.0, 0.0, 1.0]),
            top_p=0.9 if chosen.random() < 0.05 else 1.0,
            frequency_penalty=0.5 if chosen.random() < 0.005 else 0.0,
            seed=self.num_added,
        )
        prompt = [chosen.randrange(3, 6)] * chosen.randrange(1, 70)
        priority, tenant = chosen.randrange(3), chosen.choice("ab")
        self.engine.add_request(name, prompt, params, tenant=tenant, priority=priority)
        self.live[name] = None
        self.num_added += 1

    def disturb(self) -> None:
        chosen, fate = self.chosen, self.chosen.random()
        name = chosen.choice(list(self.live))
        if fate < 0.3:
            self.engine.abort(name)
        elif fate < 0.35:
            self.engine.preempt(name)
        elif fate < 0.38 and self.engine.swap_out(name):
            self.held[name] = None
        for held in list(self.held):
            if chosen.random() < 0.2 or not self.engine.has_unfinished():
                self.engine.swap_in(held)
                del self.held[held]


@pytest.mark.fuzz
@pytest.mark.parametrize("overlaps", [False, True])
def test_random_traffic_leaves_clean_books(make_engine: Any, tmp_path: Path, overlaps: bool) -> None:
    engine = make_engine(
        num_kv_blocks=60,
        max_model_len=90,
        max_num_batched_tokens=40,
        max_num_waiting=64,
        kv_swap=("host:200KiB", f"file:{tmp_path}/kv:1MiB"),
        itl_target_ms=3.0,
    )
    if overlaps:
        engine._runner, engine._overlaps = LateRunner(engine._runner), True
    traffic = Traffic(engine, REQUESTS_PER_EXAMPLE * settings.default.max_examples)
    traffic.run()
    engine.check_integrity()
    stats = engine.stats()
    assert traffic.num_added == traffic.num_ended and not traffic.live
    assert (stats.num_running, stats.num_waiting, stats.num_held, stats.kv_usage) == (0, 0, 0, 0.0)
    assert stats.preemptions and stats.num_failed == 0
