"""Greedy tokens equal transformers' generate, for every family, alone and in every kind of company."""

from __future__ import annotations

import random

import pytest
import torch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "qwen3-mixed")
EOS = 2
MAX_TOKENS = 32


def _prompts(count: int, seed: int) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(3, 300) for _ in range(chosen.randrange(1, 70))] for _ in range(count)]


def _expected(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


PLAIN = {"fuse_layers": False}  # torch alone, also where a compiler is
VARIANT = {**PLAIN, "batch_invariant": False}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, PLAIN) for family in ("llama", "qwen3-mixed")),
        *((family, VARIANT) for family in ("llama", "mistral")),
    ],
)
def test_answers_equal_transformers_generate(family, settings, oracle, make_engine, greedy) -> None:
    prompts = _prompts(10, seed=FAMILIES.index(family))
    expected = [_expected(oracle(family), prompt) for prompt in prompts]
    assert any(len(prompt) + len(answer) > 60 for prompt, answer in zip(prompts, expected, strict=True))

    alone = make_engine(family, max_num_seqs=1, enable_prefix_cache=False, **settings)
    assert alone.generate(prompts, greedy(MAX_TOKENS)) == expected

    mixed = make_engine(family, max_num_seqs=6, max_num_batched_tokens=13, max_num_waiting=4, **settings)
    assert mixed.generate(prompts, greedy(MAX_TOKENS)) == expected
    assert mixed.stats().num_steps > len(prompts)

    starved = make_engine(
        family,
        num_kv_blocks=40,
        max_model_len=120,
        max_num_batched_tokens=32,
        **settings,
    )
    assert starved.generate(prompts, greedy(MAX_TOKENS)) == expected
    assert starved.stats().preemptions > 0
    for engine in (alone, mixed, starved):
        engine.check_integrity()
        assert engine.stats().kv_usage == 0.0


def test_logprobs_are_the_models_own(oracle, make_engine, greedy) -> None:
    prompt = _prompts(1, seed=9)[0]
    engine = make_engine("qwen3")
    engine.add_request("r", prompt, greedy(6, num_logprobs=3, logit_bias={5: 50.0}, ignore_eos=True))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    tokens = [output.token_id for output in outputs]
    with torch.inference_mode():
        logits = oracle("qwen3")(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    for row, output in zip(logprobs, outputs, strict=True):
        assert output.logprob == pytest.approx(row[output.token_id].item(), abs=1e-3)
        values, ids = row.topk(3)
        assert [token for token, _ in output.top_logprobs] == ids.tolist()
        assert [value for _, value in output.top_logprobs] == pytest.approx(values.tolist(), abs=1e-3)
