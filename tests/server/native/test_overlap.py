"""Steps that overlap: tokens come one step later, and are the same; books stay clean. No GPU is needed."""

from __future__ import annotations

import random

import pytest

from late_runner import LateRunner
from longshore_server.native import SamplingParams
from longshore_server.native.engine import Launch
from longshore_server.native.sampler import SampledToken


@pytest.fixture
def make_late(make_engine):
    def make(**settings):
        engine = make_engine("llama", **settings)
        engine._runner, engine._overlaps = LateRunner(engine._runner), True
        return engine

    return make


def _params(count: int) -> list[SamplingParams]:
    chosen = random.Random(count)
    return [
        SamplingParams(
            max_tokens=chosen.randrange(1, 20),
            temperature=chosen.choice([0.0, 1.0]),
            frequency_penalty=chosen.choice([0.0, 0.0, 0.7]),
            min_tokens=chosen.choice([0, 1]),
            stop_token_ids=tuple(chosen.sample(range(300), 20)),
            seed=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("num_kv_blocks", [256, 26])
def test_answers_are_those_of_plain_steps(make_engine, make_late, num_kv_blocks) -> None:
    settings = {"num_kv_blocks": num_kv_blocks, "max_model_len": 100, "max_num_batched_tokens": 16}
    prompts = [[3 + index] * (1 + 5 * index) for index in range(12)]
    params = _params(len(prompts))
    expected = make_engine("llama", **settings).generate(prompts, params)
    engine = make_late(**settings)
    assert engine.generate(prompts, params) == expected
    engine.check_integrity()
    assert engine.stats().kv_usage == 0.0
    assert bool(engine.stats().preemptions) == (num_kv_blocks == 26)


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_steps_overlap_beside_blocks_that_leave_and_come_back(
    make_engine, make_late, enable_prefix_cache
) -> None:
    """A preempted sequence's blocks are saved behind the step that still writes them."""
    settings = {
        "max_model_len": 100,
        "max_num_batched_tokens": 16,
        "enable_prefix_cache": enable_prefix_cache,
    }
    prompts = [[3 + index] * (1 + 5 * index) for index in range(12)]
    params = _params(len(prompts))
    expected = make_engine("llama", **settings).generate(prompts, params)
    engine = make_late(num_kv_blocks=26, kv_swap=("host:4MiB",), **settings)
    assert engine.generate(prompts, params) == expected
    engine.check_integrity()
    stats = engine.stats()
    assert stats.num_swaps_chosen and stats.num_blocks_swapped_in and stats.kv_usage == 0.0


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_what_was_kept_of_a_step_that_went_wrong_serves_nobody(
    make_late, greedy, enable_prefix_cache
) -> None:
    engine = make_late(kv_swap=("host:4MiB",), enable_prefix_cache=enable_prefix_cache)
    engine.add_request("r", [5] * 12, greedy(4))
    engine.step()
    assert engine.preempt("r") and engine.stats().num_blocks_in_swap == 3
    (launch,) = engine._in_flight.launches
    wrong = [SampledToken(0, error="its logits are not finite")]
    engine._in_flight.launches[0] = Launch(launch.chunks, lambda: wrong)
    assert [output.error for output in engine.step()] == [wrong[0].error]
    engine._offload.execute()
    assert engine.stats().num_blocks_in_swap == 0
    engine.check_integrity()


def test_a_step_hands_out_the_tokens_of_the_one_before(make_late, greedy) -> None:
    engine = make_late()
    engine.add_request("r", [5, 6], greedy(2, ignore_eos=True))
    assert engine.step() == []
    assert [output.offset for output in engine.step()] == [0]
    assert [output.finish_reason for output in engine.step()] == ["length"]
    assert not engine.has_unfinished()


def test_random_aborts_leave_clean_books(make_late) -> None:
    chosen = random.Random(4)
    engine = make_late(num_kv_blocks=30, max_model_len=80, max_num_batched_tokens=24)
    offsets: dict[str, int] = {}
    ended: set[str] = set()
    for number, params in enumerate(_params(120)):
        name = f"r{number}"
        offsets[name] = 0
        prompt = [chosen.choice([7, 8])] * chosen.randrange(1, 60)
        engine.add_request(name, prompt, params, priority=chosen.randrange(3))
        if chosen.random() < 0.3:
            engine.abort(chosen.choice(sorted(offsets)))
        for output in engine.step() if number < 119 else _rest(engine):
            assert output.offset == offsets[output.request_id] and output.request_id not in ended
            offsets[output.request_id] += output.token_id is not None
            if output.finish_reason is not None:
                ended.add(output.request_id)
        engine.check_integrity()
    assert ended == set(offsets) and engine.stats().preemptions


def _rest(engine):
    for _ in range(3000):
        if not engine.has_unfinished():
            return
        yield from engine.step()
    raise AssertionError("the engine does not come to an end")
