"""The budget of a step for a gap between tokens: what is learnt, and what the scheduler makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from longshore_server.native.blocks import BlockPool
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Chunk, Scheduler
from longshore_server.native.sequence import Sequence as Request
from longshore_server.native.step_time import FIRST_TOKENS, MAX_GROWTH, StepBudget, StepTimes

SECONDS = st.floats(1e-4, 1.0)
TOKENS = st.integers(1, 8192)


@given(
    fixed_s=SECONDS,
    token_s=st.floats(1e-6, 1e-3),
    sizes=st.lists(TOKENS, min_size=12, max_size=24, unique_by=lambda n: n // 600),
    spoilt=st.floats(2.0, 100.0),
)
def test_the_line_of_steps_is_found_though_some_are_spoilt(fixed_s, token_s, sizes, spoilt) -> None:
    times = StepTimes()
    for index, num_tokens in enumerate(sizes):
        seconds = fixed_s + token_s * num_tokens
        times.note(0, num_tokens, seconds * (spoilt if index % 6 == 3 else 1.0))
    assert times.line is not None
    for num_tokens in (max(sizes), max(sizes) // 2):
        assert times.line.seconds(num_tokens) == pytest.approx(fixed_s + token_s * num_tokens, rel=0.15)


@given(
    steps=st.lists(st.tuples(st.integers(0, 256), st.integers(0, 8192), st.floats(-1, 10)), max_size=40),
    target_s=SECONDS,
    num_decodes=st.integers(1, 256),
    min_prefill=st.integers(1, 64),
)
def test_a_budget_holds_its_bounds_whatever_was_measured(steps, target_s, num_decodes, min_prefill) -> None:
    """Decodes and a little prefill always get in; nothing goes far beyond what was seen; no line falls."""
    times = StepTimes()
    for step in steps:
        times.note(*step)
    tokens = StepBudget(times, target_s, min_prefill).tokens(num_decodes)
    assert tokens >= num_decodes + min_prefill
    largest = max([n + d for d, n, s in steps if n and s > 0], default=0)
    assert tokens <= max(FIRST_TOKENS, MAX_GROWTH * largest, num_decodes + min_prefill)
    if times.line is not None:
        assert times.line.fixed_s >= 0 and times.line.token_s >= 0


def test_equal_prefills_are_set_against_decodes() -> None:
    times = StepTimes()
    for _ in range(5):
        times.note(8, 0, 0.010)
        times.note(8, 512, 0.060)
    assert times.line.token_s == pytest.approx(0.050 / 512)
    assert times.max_tokens(0.030) == pytest.approx(8 + 0.020 / (0.050 / 512), abs=2)


class _Virtual:
    """A machine whose steps take `fixed_s` and `token_s` each token, by a clock of its own."""

    def __init__(self, runner, fixed_s: float, token_s: float) -> None:
        self.overlaps = False
        self.now_s = 0.0
        self._runner, self._fixed_s, self._token_s = runner, fixed_s, token_s

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self._runner.clear_blocks(blocks)

    def launch(self, chunks: Sequence[Chunk]) -> Callable[[], list]:
        self.now_s += self._fixed_s + self._token_s * sum(chunk.num_tokens for chunk in chunks)
        return self._runner.launch(chunks)


def _gaps(make_engine, target_ms: float | None, token_s: float = 0.001) -> tuple[list[float], object]:
    """The gaps of an answer whose neighbours bring long prompts, and the engine."""
    machines: list[_Virtual] = []
    engine = make_engine(
        "llama", clock=lambda: machines[0].now_s if machines else 0.0, itl_target_ms=target_ms
    )
    machines.append(_Virtual(engine._runner, 0.005, token_s))
    engine._runner = machines[0]
    chosen = random.Random(2)
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    engine.add_request("watched", [5, 6, 7], params)
    moments = []
    for step in range(160):
        if step % 12 == 6:
            prompt = [chosen.randrange(3, 300) for _ in range(chosen.randrange(60, 200))]
            engine.add_request(f"r{step}", prompt, SamplingParams(max_tokens=3, temperature=0.0))
        for output in engine.step():
            assert output.error is None
            if output.request_id == "watched":
                moments.append(machines[0].now_s)
    engine.check_integrity()
    return [late - early for early, late in pairwise(moments)], engine


def test_gaps_stay_at_the_target_and_prompts_get_their_turn(make_engine) -> None:
    free, _ = _gaps(make_engine, None)
    bounded, engine = _gaps(make_engine, 40.5)
    assert max(free) > 0.120
    assert max(bounded[40:]) <= 0.0405  # what there is to learn is learnt by then
    assert engine.stats().num_finished >= 10
    assert engine.stats().num_steps_over_target <= 8
    assert engine.last_step.predicted_s is None or engine.last_step.num_prefill_tokens


def test_a_target_that_cannot_be_met_slows_prompts_and_does_not_stop_them(make_engine) -> None:
    gaps, engine = _gaps(make_engine, 1.0)
    assert engine.stats().num_finished >= 3
    assert max(gaps[40:]) <= 0.00501 + 0.001 * (4 + 8)  # one block of prompt beside what decodes


def test_without_decodes_a_step_is_as_large_as_it_may_be() -> None:
    scheduler = Scheduler(
        BlockPool(100, 4),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_num_waiting=4,
        step_budget=StepBudget(StepTimes(), 1e-6, 4),
    )
    for number in range(2):
        params = SamplingParams(max_tokens=8)
        scheduler.add(Request(str(number), [1] * 200, params, max_model_len=300, arrival=number))
    assert [chunk.num_tokens for chunk in scheduler.schedule(0.0).chunks] == [64]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "fast", 1e7])
def test_a_target_that_is_none_is_refused(value) -> None:
    with pytest.raises(ConfigError, match="itl_target_ms"):
        EngineConfig(model="m", itl_target_ms=value)
