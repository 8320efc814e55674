"""The device's sampler and the core's: the same randomness bit for bit, and the same choices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshore.device import randomness
from longshore.device.sampling import Sampler, SamplingSettings
from longshore.seeds import row_keys
from longshore_server.native import randomness as core_randomness
from longshore_server.native.sampler import sample as core_sample
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.sequence import Sequence

VOCAB_SIZE = 600  # more than the core looks at first when it filters
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**20)


@given(SEEDS, POSITIONS)
def test_random_bits_are_the_cores(seed: int, position: int) -> None:
    first, second = row_keys(seed, position)
    ids = np.arange(VOCAB_SIZE, dtype=np.int64)
    tensor = torch.from_numpy(ids)[None]
    ours = randomness._mix32(ids.astype(np.uint64) * np.uint64(0x9E3779B1) + np.uint64(first))
    theirs = core_randomness._mix32(tensor * 0x9E3779B1 + first)
    assert ours.astype(np.int64).tolist() == theirs[0].tolist()
    noise = randomness.gumbel_noise((first, second), ids)
    expected = core_randomness.gumbel_noise(torch.tensor([[first, second]]), tensor)[0].numpy()
    np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-6)  # log differs in the last bit


def _both(
    logits: np.ndarray[Any, Any], history: tuple[list[int], list[int]], **fields: Any
) -> tuple[Any, Any]:
    prompt, generated = history
    params = SamplingParams(max_tokens=1000, stop_token_ids=(1,), **fields)
    sequence = Sequence("r", prompt, params, max_model_len=4096, continue_from=generated)
    theirs = core_sample(torch.from_numpy(logits)[None], [sequence])[0]
    ours = Sampler(SamplingSettings(**fields), VOCAB_SIZE, prompt, generated, (1,)).sample(logits)
    return ours, theirs


SETTINGS = st.fixed_dictionaries(
    {"seed": SEEDS, "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0])},
    optional={
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
        "top_k": st.sampled_from([1, 2, 40, 599, 600, 5000]),
        "min_p": st.sampled_from([0.001, 0.1, 1.0]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.sampled_from([0.5, 1.1, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-100, 100), max_size=4),
        "min_tokens": st.integers(0, 6),
        "num_logprobs": st.integers(0, 5),
    },
)
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5)


@given(SETTINGS, st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 20.0]), TOKENS, TOKENS)
def test_choices_are_the_cores(
    fields: dict[str, Any], draw: int, scale: float, prompt: list[int], generated: list[int]
) -> None:
    logits = (np.random.default_rng(draw).standard_normal(VOCAB_SIZE) * scale).astype(np.float32)
    ours, theirs = _both(logits, ([0, *prompt], generated), **fields)
    if ours.token_id != theirs.token_id:  # where sums in fp32 round a token over the edge of top-p
        top_p = fields["top_p"]
        near = [top_p * (1 + shift) for shift in (-1e-5, 1e-5)]
        others = [
            _both(logits, ([0, *prompt], generated), **fields | {"top_p": min(p, 1.0)})[0] for p in near
        ]
        assert theirs.token_id in {other.token_id for other in others}
        return
    if theirs.logprob is None:
        assert ours.logprob is None
        return
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert [token_id for token_id, _ in ours.top_logprobs] == [
        token_id for token_id, _ in theirs.top_logprobs
    ]


@pytest.mark.parametrize(
    "fields", [{"frequency_penalty": 1.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.5}]
)
def test_penalties_follow_the_answer_as_the_cores_do(fields: dict[str, float]) -> None:
    logits = np.random.default_rng(3).standard_normal(VOCAB_SIZE).astype(np.float32) * 2
    sampler = Sampler(SamplingSettings(temperature=0, **fields), VOCAB_SIZE, [0])
    params = SamplingParams(max_tokens=1000, temperature=0, **fields)
    sequence = Sequence("r", [0], params, max_model_len=4096)
    ours, theirs = [], []
    for _ in range(12):
        ours.append(sampler.sample(logits).token_id)
        theirs.append(core_sample(torch.from_numpy(logits)[None], [sequence])[0].token_id)
        sequence.append(theirs[-1])
    assert ours == theirs and len(set(ours)) > 1


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(filters: dict[str, float]) -> None:
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    kept = {"top_p": [0, 1], "top_k": [0, 1, 2], "min_p": [0, 1, 2, 3]}.get(next(iter(filters), ""), range(5))
    expected = np.array([p if i in kept else 0 for i, p in enumerate(probabilities)])
    expected /= expected.sum()
    num_draws = 4000
    counts = np.zeros(5)
    for seed in range(num_draws):
        counts[Sampler(SamplingSettings(seed=seed, **filters), 5, [0]).sample(logits).token_id] += 1
    assert np.abs(counts / num_draws - expected).max() < 4 * np.sqrt(0.25 / num_draws)
    assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = np.zeros(5, np.float32)
    logits[3] = bad
    with pytest.raises(ValueError, match="finite"):
        Sampler(SamplingSettings(), 5, [0]).sample(logits)
