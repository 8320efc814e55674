"""The sampler against plain numpy, row by row, and against the distributions that it promises."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from longshore_server.native.sampler import NUM_FILTER_CANDIDATES, sample
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.sequence import Sequence

VOCAB = 40


def _sequence(prompt=(1,), answer=(), *, eos=(), **params) -> Sequence:
    params.setdefault("max_tokens", 1000)
    return Sequence(
        "r",
        list(prompt),
        SamplingParams(**params),
        max_model_len=10_000,
        eos_token_ids=frozenset(eos),
        continue_from=list(answer),
    )


def _logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(0, 2, (rows, vocab)), dtype=torch.float32)


def _numpy_processed(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Bias and penalties as OpenAI and vLLM define them, one token at a time."""
    params = sequence.params
    prompt = sequence.token_ids[: sequence.num_prompt_tokens]
    answer = sequence.token_ids[sequence.num_prompt_tokens :]
    result = logits.astype(np.float64).copy()
    for token in range(len(result)):
        if len(answer) < params.min_tokens and token in sequence.stop_token_ids:
            result[token] = -np.inf
        result[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in answer:
            r = params.repetition_penalty
            result[token] = result[token] / r if result[token] > 0 else result[token] * r
        result[token] -= params.frequency_penalty * answer.count(token)
        result[token] -= params.presence_penalty * (token in answer)
    return result


def _numpy_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, then min-p, top-k and top-p, each renormalized."""
    scaled = logits / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs = np.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if params.top_k > 0:
        probs = np.where(probs >= np.sort(probs)[::-1][min(params.top_k, len(probs)) - 1], probs, 0.0)
    probs /= probs.sum()
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[before < params.top_p]
    result = np.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


PENALTIES = {
    "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    "answer": st.lists(st.integers(0, VOCAB - 1), max_size=12),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20), max_size=4),
    "min_tokens": st.integers(0, 20),
}


@given(st.lists(st.fixed_dictionaries(PENALTIES), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_greedy_takes_the_best_after_bias_and_penalties(rows, seed) -> None:
    sequences = [_sequence(temperature=0.0, eos=(3,), **row) for row in rows]
    logits = _logits(len(rows), seed)
    for row, (token, sequence) in enumerate(zip(sample(logits, sequences), sequences, strict=True)):
        expected = _numpy_processed(logits[row].numpy(), sequence)
        assert expected[token.token_id] >= expected.max() - 1e-4


def test_penalty_counts_follow_the_sequence_as_it_grows() -> None:
    sequence = _sequence(prompt=(1, 2), temperature=0.0, frequency_penalty=0.7, repetition_penalty=1.3)
    for step in range(20):
        logits = _logits(1, seed=step % 3)
        expected = int(np.argmax(_numpy_processed(logits[0].numpy(), sequence)))
        (token,) = sample(logits, [sequence])
        assert token.token_id == expected
        sequence.append(token.token_id)


FILTERS = [
    {},
    {"temperature": 0.4},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_draws_follow_the_distribution(settings) -> None:
    """Chi-square over 4,000 draws; 5 standard deviations of slack, so that only a wrong sampler fails."""
    num_draws = 4_000
    logits = _logits(1, seed=11)
    sequences = [_sequence(seed=seed, **{"temperature": 1.0, **settings}) for seed in range(num_draws)]
    drawn = [token.token_id for token in sample(logits.expand(num_draws, -1), sequences)]
    counts = np.bincount(drawn, minlength=VOCAB)
    expected = _numpy_distribution(logits[0].numpy(), sequences[0].params) * num_draws
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    chi_square = ((observed - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    degrees = max(1, (wanted > 0).sum() - 1)
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees) + 5


WIDE_FILTERS = [
    {"top_p": 0.999},
    {"top_p": 0.2},  # decided by the first candidates, as a share of the whole vocabulary's mass
    {"top_k": 700},
    {"top_k": 700, "top_p": 0.2},
    {"min_p": 1e-4},
]


@pytest.mark.parametrize("settings", WIDE_FILTERS, ids=str)
def test_filters_over_a_vocabulary_larger_than_the_first_candidates(settings) -> None:
    vocab = 4 * NUM_FILTER_CANDIDATES
    logits = _logits(1, seed=2, vocab=vocab) * 0.1  # nearly flat: hundreds of tokens are kept
    sequences = [_sequence(seed=seed, **settings) for seed in range(3000)]
    allowed = _numpy_distribution(logits[0].numpy(), sequences[0].params) > 0
    drawn = {token.token_id for token in sample(logits.expand(3000, -1), sequences)}
    assert allowed[list(drawn)].all()
    assert len(drawn) > 0.9 * allowed.sum() * (1 - np.exp(-3000 / allowed.sum()))


ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0]),
        "top_p": st.sampled_from([1.0, 0.7]),
        "top_k": st.sampled_from([0, 4]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "num_logprobs": st.sampled_from([None, 0, 3]),
        "logit_bias": st.sampled_from([{}, {7: 4.0}]),
        "seed": st.integers(0, 2**64 - 1),
        "answer": st.lists(st.integers(0, VOCAB - 1), max_size=5),
    }
)


@given(st.lists(ROW, min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_its_neighbours(rows, seed) -> None:
    logits = _logits(len(rows), seed)
    together = sample(logits, [_sequence(**row) for row in rows])
    for index, row in enumerate(rows):
        (alone,) = sample(logits[index : index + 1], [_sequence(**row)])
        assert alone == together[index]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = _logits(2, seed=4)
    plain = _sequence(temperature=0.0)
    asked = _sequence(temperature=0.0, num_logprobs=4, logit_bias={9: 100.0})
    first, second = sample(logits, [plain, asked])
    assert first.logprob is None and first.top_logprobs == ()
    raw = logits[1].double().numpy()
    logprobs = raw - np.log(np.exp(raw).sum())
    assert second.token_id == 9
    assert second.logprob == pytest.approx(logprobs[9], abs=1e-5)
    best = np.argsort(-logprobs)[:4]
    assert [token for token, _ in second.top_logprobs] == best.tolist()
    assert [value for _, value in second.top_logprobs] == pytest.approx(logprobs[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}, {"num_logprobs": 2}], ids=str)
def test_unusable_logits_fail_their_own_row_alone(bad, settings) -> None:
    logits = _logits(3, seed=5)
    clean = sample(logits, [_sequence(seed=row, **settings) for row in range(3)])
    logits[1] = bad
    tokens = sample(logits, [_sequence(seed=row, **settings) for row in range(3)])
    assert tokens[1].error is not None
    assert (tokens[0], tokens[2]) == (clean[0], clean[2])


def test_one_nan_in_a_row_is_seen() -> None:
    logits = _logits(1, seed=5)
    logits[0, 17] = float("nan")
    assert sample(logits, [_sequence(temperature=0.0)])[0].error is not None
