"""Continuing an answer from any prefix gives exactly the rest, and company never changes a token."""

from __future__ import annotations

import random

import pytest

from longshore_server.native import NativeEngine, SamplingParams, TokenOutput

STYLES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 2**63 + 11},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 30, "min_p": 0.01, "seed": 5},
    "penalties": {
        "temperature": 0.8,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 3.0},
        "seed": 6,
    },
}


def _prompt(seed: int, length: int = 37) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(3, 300) for _ in range(length)]


def _outputs(engine: NativeEngine, *requests: tuple) -> dict[str, list[TokenOutput]]:
    """Runs requests (id, prompt, params, continue_from) to their ends."""
    outputs: dict[str, list[TokenOutput]] = {}
    for request_id, prompt, params, continue_from in requests:
        outputs[request_id] = []
        engine.add_request(request_id, prompt, params, continue_from=continue_from)
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize(
    ("family", "fuse_layers"), [("qwen3", None), ("mistral", None), ("mistral", False)], ids=str
)
def test_any_prefix_is_continued_to_the_bit(family, fuse_layers, style, make_engine) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, num_logprobs=2, **STYLES[style])
    prompt = _prompt(1)
    engine = make_engine(family, enable_prefix_cache=False, fuse_layers=fuse_layers)
    assert engine.batch_invariant
    whole = _outputs(engine, ("whole", prompt, params, ()))["whole"]
    tokens = [output.token_id for output in whole]
    crowd = make_engine(family, max_num_batched_tokens=11, max_num_waiting=64, fuse_layers=fuse_layers)
    requests = [(f"from-{cut}", prompt, params, tokens[:cut]) for cut in range(30)]
    resumed = _outputs(crowd, *requests)
    for cut in range(30):
        rest = resumed[f"from-{cut}"]
        assert [(o.token_id, o.offset, o.finish_reason) for o in rest] == [
            (o.token_id, o.offset, o.finish_reason) for o in whole[cut:]
        ]
        assert [(o.logprob, o.top_logprobs) for o in rest] == [
            (o.logprob, o.top_logprobs) for o in whole[cut:]
        ]
    assert whole[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("batch_invariant", "fuse_layers"), [(None, None), (None, False), (False, False)], ids=str
)
def test_answers_do_not_depend_on_company(make_engine, batch_invariant, fuse_layers) -> None:
    """Also outside the batch-invariant mode tokens agree: a last-bit difference would need a tie to show."""
    chosen = random.Random(3)
    requests = [
        (
            f"r{index}",
            _prompt(index, chosen.randrange(1, 60)),
            SamplingParams(max_tokens=chosen.randrange(1, 30), **STYLES[chosen.choice(list(STYLES))]),
            (),
        )
        for index in range(20)
    ]
    settings = {"batch_invariant": batch_invariant, "fuse_layers": fuse_layers}
    engine = make_engine("llama", max_num_seqs=1, enable_prefix_cache=False, **settings)
    alone = {request[0]: _outputs(engine, request)[request[0]] for request in requests}
    chosen.shuffle(requests)
    crowd = make_engine(
        "llama",
        max_num_seqs=7,
        max_num_batched_tokens=17,
        num_kv_blocks=60,
        max_model_len=100,
        **settings,
    )
    together = _outputs(crowd, *requests)
    assert crowd.stats().preemptions > 0
    for request_id, outputs in alone.items():
        assert [o.token_id for o in together[request_id]] == [o.token_id for o in outputs]
        if batch_invariant is None:
            assert [o.logprob for o in together[request_id]] == [o.logprob for o in outputs]
    crowd.check_integrity()


def test_a_whole_answer_ends_without_another_token(make_engine, greedy) -> None:
    engine = make_engine("llama")
    for continue_from, params, reason in (
        ([5, 6, 7], greedy(3), "length"),
        ([5, 2], greedy(9), "stop"),
        ([5, 8], greedy(9, stop_token_ids=(8,)), "stop"),
    ):
        (output,) = _outputs(engine, ("r", _prompt(2), params, continue_from))["r"]
        assert (output.token_id, output.finish_reason, output.offset) == (None, reason, len(continue_from))


def test_seeds_matter_and_one_seed_repeats(make_engine) -> None:
    engine = make_engine("llama")
    answers = engine.generate(
        [_prompt(4)] * 6,
        [SamplingParams(max_tokens=12, seed=seed, ignore_eos=True) for seed in (1, 1, 2, 3, 4, 5)],
    )
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) == 5
