"""Chooses the next token of every row at once: penalties, bias, temperature, filters, draw, logprobs.

Each row's result is a function of its own logits, settings and (seed, position); neighbours never matter.
It knows sequences, not models.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from longshore.seeds import row_keys
from longshore_server.native.randomness import gumbel_noise
from longshore_server.native.sampling_params import GREEDY_BELOW_TEMPERATURE
from longshore_server.native.sequence import Sequence

# Filters look at this many of the likeliest tokens first, and at the whole vocabulary if those do not decide.
NUM_FILTER_CANDIDATES = 256
NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's result; `error` is set, and the token meaningless, when its logits were not usable."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


@dataclass(slots=True)
class TokenCounts:
    """Per-sequence counts for penalties, brought up to date when the sequence samples."""

    in_prompt: torch.Tensor  # [vocab] bool
    generated: torch.Tensor  # [vocab] float32
    num_seen: int


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
    """One token for each row of `logits` [rows, vocab]; `sequences` in the same order."""
    best, choice = logits.max(dim=-1)  # NaN anywhere in a row becomes its maximum
    if all(sequence.params.is_plain_greedy for sequence in sequences):
        return _tokens(choice, best)
    raw = logits.to(torch.float32)
    processed = _penalize(raw, sequences)
    chosen = processed.argmax(dim=-1)
    random_rows = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
    if random_rows:
        _draw(processed, [sequences[row] for row in random_rows], random_rows, chosen)
    tokens = _tokens(chosen, best)
    _add_logprobs(tokens, raw, chosen, sequences)
    return tokens


def _tokens(chosen: torch.Tensor, best: torch.Tensor) -> list[SampledToken]:
    usable = torch.isfinite(best)
    if bool(usable.all()):
        return [SampledToken(token_id) for token_id in chosen.tolist()]
    return [
        SampledToken(token_id, error=None if ok else NOT_FINITE)
        for token_id, ok in zip(chosen.tolist(), usable.tolist(), strict=True)
    ]


# --- logits: minimum length, bias, penalties ---


def _penalize(raw: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Logits after the processors that change the arg-max; the raw ones stay as they are."""
    if not any(s.must_not_stop or s.params.logit_bias or s.params.has_penalties for s in sequences):
        return raw
    logits = raw.clone()
    stops = [
        (row, token_id)
        for row, sequence in enumerate(sequences)
        if sequence.must_not_stop
        for token_id in sequence.stop_token_ids
    ]
    if stops:
        logits[torch.tensor(stops, device=logits.device).unbind(1)] = float("-inf")
    _add_bias(logits, sequences)
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_penalties]
    if rows:
        _apply_penalties(logits, [sequences[row] for row in rows], rows)
    return logits


def _add_bias(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> None:
    places = [
        (row, token_id, bias)
        for row, sequence in enumerate(sequences)
        for token_id, bias in sequence.params.logit_bias.items()
    ]
    if places:
        rows, token_ids, biases = zip(*places, strict=True)
        index = torch.tensor([rows, token_ids], device=logits.device)
        logits[index[0], index[1]] += torch.tensor(biases, dtype=torch.float32, device=logits.device)


def _apply_penalties(logits: torch.Tensor, sequences: list[Sequence], rows: list[int]) -> None:
    """Repetition over prompt and answer, then frequency and presence over the answer, as vLLM orders them."""
    counts = [_counts(sequence, logits) for sequence in sequences]
    generated = torch.stack([count.generated for count in counts])  # [rows, vocab]
    seen = torch.stack([count.in_prompt for count in counts]) | (generated > 0)
    repetition = _column([s.params.repetition_penalty for s in sequences], logits)
    frequency = _column([s.params.frequency_penalty for s in sequences], logits)
    presence = _column([s.params.presence_penalty for s in sequences], logits)
    values = logits[rows]
    scaled = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(seen, scaled, values)
    logits[rows] = values - frequency * generated - presence * (generated > 0)


def _counts(sequence: Sequence, logits: torch.Tensor) -> TokenCounts:
    counts = sequence.sampler_state
    if not isinstance(counts, TokenCounts):
        in_prompt = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        in_prompt[sequence.token_ids[: sequence.num_prompt_tokens]] = True
        generated = torch.zeros(logits.shape[1], device=logits.device)
        sequence.sampler_state = counts = TokenCounts(in_prompt, generated, sequence.num_prompt_tokens)
    for token_id in sequence.token_ids[counts.num_seen :]:
        counts.generated[token_id] += 1
    counts.num_seen = len(sequence.token_ids)
    return counts


# --- the draw ---


def _draw(logits: torch.Tensor, sequences: list[Sequence], rows: list[int], chosen: torch.Tensor) -> None:
    """Draws for the rows that are not greedy, writing into `chosen`."""
    values = logits if len(rows) == logits.shape[0] else logits[rows]
    temperature = _column([max(s.params.temperature, GREEDY_BELOW_TEMPERATURE) for s in sequences], logits)
    scaled = (values - values.amax(dim=-1, keepdim=True)) / temperature  # the likeliest token is at 0
    keys = torch.tensor([row_keys(s.params.seed, s.next_offset) for s in sequences], device=logits.device)
    filtered = [index for index, s in enumerate(sequences) if s.params.has_filters]
    plain = [index for index, s in enumerate(sequences) if not s.params.has_filters]
    drawn = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    if plain:
        drawn[plain] = _draw_plain(scaled[plain], keys[plain])
    if filtered:
        drawn[filtered] = _draw_filtered(scaled[filtered], keys[filtered], [sequences[i] for i in filtered])
    chosen[rows] = drawn


def _draw_plain(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    token_ids = torch.arange(scaled.shape[1], device=scaled.device)[None, :]
    return (scaled + gumbel_noise(keys, token_ids)).argmax(dim=-1)


def _draw_filtered(scaled: torch.Tensor, keys: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Draws among the tokens at or above each row's threshold; equal logits stand or fall together."""
    for num_candidates in (min(NUM_FILTER_CANDIDATES, scaled.shape[1]), scaled.shape[1]):
        candidates, token_ids = scaled.topk(num_candidates, dim=-1)  # likeliest first
        threshold = _threshold(scaled, candidates, sequences)
        decided = num_candidates == scaled.shape[1] or bool((threshold > candidates[:, -1:]).all())
        if decided:
            break
    kept = candidates.masked_fill(candidates < threshold, float("-inf"))
    winner = (kept + gumbel_noise(keys, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, winner)[:, 0]


def _threshold(scaled: torch.Tensor, candidates: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """The lowest scaled logit [rows, 1] that min-p, then top-k, then top-p keep, as far as candidates tell.

    Top-p renormalizes over what the others kept, as vLLM does. A threshold at the last candidate or below it
    means that more candidates are needed.
    """
    num_candidates, vocab_size = candidates.shape[1], scaled.shape[1]
    min_p = _column([s.params.min_p for s in sequences], scaled)
    top_p = _column([s.params.top_p for s in sequences], scaled)
    top_k = [min(s.params.top_k, vocab_size) if s.params.top_k > 0 else vocab_size for s in sequences]
    last = torch.tensor([min(k, num_candidates) - 1 for k in top_k], device=scaled.device)[:, None]
    cuts = torch.tensor([k < vocab_size for k in top_k], device=scaled.device)[:, None]
    by_top_k = candidates.gather(1, last).masked_fill(~cuts, float("-inf"))
    threshold = torch.maximum(min_p.log(), by_top_k)
    weights = candidates.exp().masked_fill(candidates < threshold, 0.0)
    total = scaled.exp().masked_fill(scaled < threshold, 0.0).sum(dim=-1, keepdim=True)
    before = weights.cumsum(dim=-1) - weights  # mass of the likelier ones
    num_kept = (before < top_p * total).sum(dim=-1, keepdim=True)
    by_top_p = candidates.gather(1, (num_kept - 1).clamp_(min=0))
    threshold = torch.where(top_p < 1.0, torch.maximum(threshold, by_top_p), threshold)
    # A top-k beyond the candidates is not known from them, nor the mass that top-p is a share of.
    is_unknown = torch.tensor([num_candidates < k < vocab_size for k in top_k], device=scaled.device)[:, None]
    return threshold.masked_fill(is_unknown, float("-inf"))


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


# --- log probabilities ---


def _add_logprobs(
    tokens: list[SampledToken], raw: torch.Tensor, chosen: torch.Tensor, sequences: SequenceOf[Sequence]
) -> None:
    """Replaces the tokens of rows that asked for logprobs: the model's own, before any processing."""
    rows = [row for row, s in enumerate(sequences) if s.params.num_logprobs is not None]
    if not rows:
        return
    logprobs = raw[rows].log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[rows][:, None])[:, 0].tolist()
    wanted = [min(sequences[row].params.num_logprobs or 0, raw.shape[1]) for row in rows]
    values, token_ids = logprobs.topk(max(wanted), dim=-1)
    ranked = zip(token_ids.tolist(), values.tolist(), strict=True)
    for row, logprob, num, (ids, tops) in zip(rows, own, wanted, ranked, strict=True):
        token = tokens[row]
        top = tuple(zip(ids[:num], tops[:num], strict=True))
        tokens[row] = SampledToken(token.token_id, logprob, top, token.error)
