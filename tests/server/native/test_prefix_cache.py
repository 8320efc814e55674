"""The prefix cache saves work, changes no token, and is never shared between tenants."""

from __future__ import annotations

from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.sequence import Sequence

PROMPT = list(range(10, 41))  # 31 tokens: seven full blocks of 4, and a rest


def _ask(engine, name: str, greedy, prompt=PROMPT, tenant: str = ""):
    engine.add_request(name, prompt, greedy(6, ignore_eos=True), tenant=tenant)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return [o.token_id for o in outputs], outputs[0].num_cached_tokens


def test_a_repeated_prompt_is_computed_once(make_engine, greedy) -> None:
    engine = make_engine("llama")
    first, cached = _ask(engine, "1", greedy)
    assert cached == 0
    again, cached = _ask(engine, "2", greedy)
    assert cached == 28 and again == first
    longer, cached = _ask(engine, "3", greedy, [*PROMPT[:17], 5, 5, 5, 5])
    assert cached == 16
    whole_blocks, cached = _ask(engine, "4", greedy, PROMPT[:28])
    assert cached == 24  # the last token is always computed, for its logits
    stats = engine.stats()
    assert stats.prefix_cache_hits == 28 + 16 + 24
    assert stats.prefix_cache_queries == 31 + 31 + 21 + 28
    uncached = make_engine("llama", enable_prefix_cache=False)
    assert _ask(uncached, "1", greedy) == (first, 0)
    assert _ask(uncached, "2", greedy) == (first, 0)
    assert _ask(uncached, "3", greedy, [*PROMPT[:17], 5, 5, 5, 5])[0] == longer
    assert _ask(uncached, "4", greedy, PROMPT[:28])[0] == whole_blocks


def test_no_tenant_sees_anothers_prefix(make_engine, greedy) -> None:
    engine = make_engine("llama")
    assert _ask(engine, "1", greedy, tenant="a")[1] == 0
    assert _ask(engine, "2", greedy, tenant="b")[1] == 0
    assert _ask(engine, "3", greedy, tenant="")[1] == 0
    assert _ask(engine, "4", greedy, tenant="a")[1] == 28


def test_n_answers_share_one_prompt(make_engine, greedy) -> None:
    engine = make_engine("llama")
    _ask(engine, "first", greedy)
    for index in range(4):
        engine.add_request(f"n{index}", PROMPT, greedy(6, ignore_eos=True))
    engine.step()
    shared = engine.stats().kv_usage * engine.config.num_kv_blocks
    assert shared == 7 + 4  # seven blocks once, and one more for each
    while engine.has_unfinished():
        engine.step()
    engine.check_integrity()


def test_digests_chain_over_all_that_precedes() -> None:
    def digests(tokens: list[int], tenant: str = "") -> list[bytes]:
        sequence = Sequence("r", tokens, SamplingParams(), max_model_len=99, tenant=tenant)
        return sequence.digest_blocks(len(tokens) // 4, 4)

    first, second = digests([1, 2, 3, 4, 5, 6, 7, 8])
    assert digests([1, 2, 3, 4]) == [first]
    assert digests([9, 2, 3, 4, 5, 6, 7, 8])[1] != second
    assert digests([1, 2, 3, 4], "a") != [first]
